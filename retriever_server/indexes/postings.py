"""Postings: for every term the passages that hold it and with which weight (a matrix by columns).

A search is a sum over the postings of the query's terms, and the best of it are found without all of the sum
(MaxScore; Turtle & Flood 1995): once the terms that are left, each bounded by its largest weight, can add
less than the k-th best has in the end, no passage without a term so far can be among the best, and in the
long lists of the frequent terms the others alone are looked up. The k-th best of a few passages that lead so
far, scored in whole, is a bound from below.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retriever_server.indexes.checksums import save_array

EXHAUSTIVE = 30_000
"""The largest corpus, in passages, of which all are summed: that takes no longer."""
LEADERS, LONG = 4, 1 / 32
"""Before the list of a term in more than LONG of the passages the LEADERS * k best are scored in whole."""
BLOCK_POSTINGS = 1 << 22
"""Postings merged at once: about 200 MB."""


@dataclass(frozen=True)
class Postings:
    """Term t owns positions[starts[t]:starts[t + 1]], and the weights there."""

    starts: np.ndarray
    """(V + 1,)"""
    positions: np.ndarray
    """(N,) of passages"""
    weights: np.ndarray
    """(N,)"""
    count: int
    """Passages of the corpus, P."""

    def list_of(self, term: int) -> tuple[np.ndarray, np.ndarray]:
        """Return positions, ascending, and weights of a term's postings.   -> (n,), (n,)"""
        return self.passages_of(term), self.weigh(term)

    def passages_of(self, term: int) -> np.ndarray:
        """Return the positions of a term's postings, ascending."""
        return self.positions[self.starts[term] : self.starts[term + 1]]

    def weigh(self, term: int, at: Any = slice(None)) -> np.ndarray:
        """Return the weights of a term's postings, or of those `at` some places of its list."""
        return self.weights[self.starts[term] : self.starts[term + 1]][at]

    def lengths(self, terms: np.ndarray) -> np.ndarray:
        """Return how many passages hold each term.   (T,) -> (T,)"""
        return self.starts[terms + 1] - self.starts[terms]

    def look_up(self, term: int, positions: np.ndarray) -> np.ndarray:
        """Return the weight of a term in some passages, 0 where it is not.   positions (N,) int32 -> (N,)"""
        of_term = self.passages_of(term)
        if not len(of_term):
            return np.zeros(len(positions), self.weights.dtype)
        at = np.searchsorted(of_term, positions)
        at[at == len(of_term)] = 0
        return np.where(of_term[at] == positions, self.weigh(term, at), 0)

    def scores_at(
        self,
        positions: np.ndarray,
        terms: Sequence[int],
        term_weights: Sequence[float] | np.ndarray | None = None,
    ) -> np.ndarray:
        """Return the `scores` of some passages, to the last bit.   positions (N,) int32 -> (N,)"""
        scores = np.zeros(len(positions))
        factors = np.ones(len(terms)) if term_weights is None else term_weights
        for term, factor in zip(terms, factors, strict=True):
            scores += self.look_up(term, positions) * float(factor)
        return scores

    def scores(
        self, terms: Sequence[int], term_weights: Sequence[float] | np.ndarray | None = None
    ) -> np.ndarray:
        """Return the sum over the terms of term weight (1 if None) x posting weight, in float64.   -> (P,)"""
        if not len(terms):
            return np.zeros(self.count)
        weights = [self.weigh(term) for term in terms]
        if term_weights is not None:
            weights = [w * float(factor) for w, factor in zip(weights, term_weights, strict=True)]
        positions = np.concatenate([self.passages_of(term) for term in terms])
        return np.bincount(positions, weights=np.concatenate(weights), minlength=self.count)


class MaxScore:
    """Search in postings, exactly: positions, scores and ties are those of all sums ranked."""

    def __init__(self, postings: Postings, exhaustive: int = EXHAUSTIVE, start: int = 0) -> None:
        """start: the row of the first passage, where the index joins several."""
        self.postings, self.exhaustive, self.start = postings, exhaustive, start
        self._largest: dict[int, float] = {}
        self._thread = threading.local()

    def top(
        self,
        terms: Sequence[int],
        k: int,
        mask: np.ndarray | None = None,
        weights: Sequence[float] | np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and scores of the `k` best positive sums, best first, ties in order.

        terms may repeat, weights: one for each, 1 if None; mask (R,) says which rows may be found.
        -> (<= k,), (<= k,)
        """
        if mask is not None:
            mask = mask[self.start : self.start + self.postings.count]
        factors = np.ones(len(terms)) if weights is None else np.asarray(weights, np.float64)
        if self.postings.count <= self.exhaustive or (factors < 0).any():
            scores = self.postings.scores(terms, weights)
            found = best(scores, k, mask)
            return found + self.start, scores[found]
        candidates = self._candidates(np.asarray(terms, np.int64), factors, k, mask)
        scores = self.postings.scores_at(candidates, terms, weights)
        found = best(scores, k)
        return candidates[found] + self.start, scores[found]

    def _candidates(
        self, terms: np.ndarray, factors: np.ndarray, k: int, mask: np.ndarray | None
    ) -> np.ndarray:
        """Return the positions, ascending, of passages that the `k` best are among."""
        rows, of_row = np.unique(terms, return_inverse=True)
        factors = np.bincount(of_row, weights=factors, minlength=len(rows))
        bounds = factors * [self._bound(row) for row in rows]
        order = [i for i in np.argsort(self.postings.lengths(rows), kind="stable") if bounds[i] > 0]
        rows, bounds, factors = rows[order], bounds[order], factors[order].astype(np.float32)
        slack = 1e-5 * bounds.sum()  # rounding in float32 is less
        left = np.append(np.cumsum(bounds[::-1])[::-1], 0) + slack  # what the terms from here on can add
        found, sums, least, used = self._add_up(rows, factors, left, k, mask)
        for at in range(used, len(rows)):
            sums = sums + factors[at] * self.postings.look_up(rows[at], found)
            keep = sums + left[at + 1] >= least
            found, sums = found[keep], sums[keep]
        return found

    def _add_up(
        self, rows: np.ndarray, factors: np.ndarray, left: np.ndarray, k: int, mask: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, float, int]:
        """Sum whole lists, the shortest first, until no other passage can be among the best.

        -> positions (N,), ascending, of passages that can, their sums so far, a score that `k` passages
        reach, and the number of terms that are in the sums
        """
        sums, parts, at, least = self._zeros(), [np.zeros(0, np.int32)], 0, 0.0
        leaders = parts[0]  # the passages with the largest sums so far
        lengths = np.append(self.postings.lengths(rows), np.inf)  # the end, too, is a place to stop
        try:
            for at, (row, factor) in enumerate(zip(rows, factors, strict=True), 1):
                positions, weights = self.postings.list_of(row)
                if mask is not None:
                    allowed = mask[positions]
                    positions, weights = positions[allowed], weights[allowed]
                before = sums[positions]
                parts.append(positions[before == 0])
                sums[positions] = after = before + weights * factor
                leaders = _leaders(sums, leaders, positions, after, LEADERS * k)
                if len(leaders) >= k and lengths[at] > LONG * self.postings.count:
                    least = max(least, self._reached(sums, leaders, rows[at:], factors[at:], k))
                    if least > left[at]:
                        break
            found = np.concatenate(parts)
            found = np.sort(found[sums[found] + left[at] >= least])
            return found, sums[found], least, at
        finally:
            for part in parts:
                sums[part] = 0

    def _reached(
        self, sums: np.ndarray, leaders: np.ndarray, rows: np.ndarray, factors: np.ndarray, k: int
    ) -> float:
        """Return the k-th best whole score of the leaders."""
        scores = sums[leaders]
        for row, factor in zip(rows, factors, strict=True):
            scores = scores + factor * self.postings.look_up(row, leaders)
        return float(np.partition(scores, -k)[-k])

    def _bound(self, row: int) -> float:
        """Return the largest weight of a term; kept, since it is a pass over the list."""
        if row not in self._largest:
            self._largest[row] = float(self.postings.list_of(row)[1].max(initial=0))
        return self._largest[row]

    def _zeros(self) -> np.ndarray:
        """Return zeros (P,) of this thread, to be left as zeros."""
        if not hasattr(self._thread, "sums"):
            self._thread.sums = np.zeros(self.postings.count, np.float32)
        return self._thread.sums


def _leaders(
    sums: np.ndarray, leaders: np.ndarray, positions: np.ndarray, after: np.ndarray, count: int
) -> np.ndarray:
    """Return the positions, ascending, of the largest sums: of the leaders and of some that have grown."""
    if len(positions) > count:
        positions = positions[np.argpartition(after, -count)[-count:]]
    both = np.union1d(leaders, positions)
    return both if len(both) <= count else np.sort(both[np.argpartition(sums[both], -count)[-count:]])


Block = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Terms, passages and weights of some postings. (N,) each"""


def blocks_of(postings: Postings, position_of: np.ndarray) -> Iterator[Block]:
    """Yield all postings of some passages, a stretch of terms at a time; weights as they are stored.

    position_of (P,): where each passage goes, -1 for one that is left out.
    """
    ends, first = postings.starts[1:], 0
    while first < len(ends):
        start = int(postings.starts[first])
        last = max(first + 1, int(np.searchsorted(ends, start + BLOCK_POSTINGS, side="right")))
        span = slice(start, int(ends[last - 1]))
        passages = position_of[postings.positions[span]]
        kept = passages >= 0
        terms = np.repeat(np.arange(first, last), np.diff(postings.starts[first : last + 1]))
        yield terms[kept], passages[kept], postings.weights[span][kept]
        first = last


def write_postings(
    folder: Path, counts: np.ndarray, blocks: Iterable[tuple[np.ndarray, ...]], dtype: Any = np.float32
) -> None:
    """Write starts.npy, positions.npy and weights.npy into a folder. Raises OSError.

    counts (V,): postings of each term. blocks: terms, passages and weights, (N,) each; each term's in the
    order of passages, within a block and from block to block.
    """
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    save_array(folder / "starts.npy", starts)
    positions, weights = _map_postings(folder, int(starts[-1]), dtype)
    free = starts[:-1].copy()
    for terms, passages, values in blocks:
        order = np.argsort(terms, kind="stable")
        terms = terms[order]
        target = free[terms] + np.arange(len(order)) - np.searchsorted(terms, terms)
        positions[target], weights[target] = passages[order], values[order]
        free += np.bincount(terms, minlength=len(free))
    positions.flush()
    weights.flush()


def open_postings(folder: Path, count: int) -> Postings:
    """Map the postings of an index over `count` passages."""
    # Plain array views of the memory maps: slicing np.memmap costs more than the sum itself.
    starts, positions, weights = (
        np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray)
        for name in ("starts", "positions", "weights")
    )
    return Postings(starts, positions, weights, count)


def _map_postings(folder: Path, count: int, dtype: Any) -> list[np.memmap]:
    """Map positions.npy and weights.npy (of `dtype`) for so many postings, to be written.

    Their disk space is taken at once: who writes into a map when the disk is full is killed (SIGBUS).
    """
    maps = []
    for name, of in (("positions", np.int32), ("weights", dtype)):
        with open(folder / f"{name}.npy", "wb") as file:
            header = {"descr": np.dtype(of).str, "fortran_order": False, "shape": (count,)}
            np.lib.format.write_array_header_1_0(file, header)
            size = max(1, count * np.dtype(of).itemsize)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), file.tell(), size)
            else:  # macOS
                file.truncate(file.tell() + size)
        maps.append(np.lib.format.open_memmap(file.name, "r+"))
    return maps


def best(scores: np.ndarray, k: int, mask: np.ndarray | None = None) -> np.ndarray:
    """Return the positions of the `k` best positive scores that `mask` allows, best first, ties in order.

    (P,) -> (<= k,)
    """
    if mask is not None:
        scores = scores * mask
    if not (k := min(k, len(scores))):
        return np.zeros(0, np.int64)
    least = np.partition(scores, -k)[-k]
    candidates = np.flatnonzero(scores >= least) if least > 0 else np.flatnonzero(scores > 0)
    return candidates[np.argsort(-scores[candidates], kind="stable")[:k]]
