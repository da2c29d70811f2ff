"""The best passages of a sum over postings without all of the sum (MaxScore; Turtle & Flood 1995).

The rare terms say which passages can be among the best; in the long lists of the frequent ones only these
are looked up. A term's bound is its largest weight: once the terms that are left can add less than the
k-th best has already, no passage without a term so far can be among the best.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from retriever_server.indexes.postings import Postings, best

EXHAUSTIVE = 30_000
"""In a corpus of so many passages all of them are summed: that takes no longer."""


class MaxScore:
    """Search in postings, exactly: positions, scores and ties are those of all sums ranked."""

    def __init__(self, postings: Postings, exhaustive: int = EXHAUSTIVE) -> None:
        self.postings, self.exhaustive = postings, exhaustive
        self._largest: dict[int, float] = {}
        self._thread = threading.local()

    def top(
        self,
        terms: Sequence[int],
        k: int,
        mask: np.ndarray | None = None,
        weights: Sequence[float] | np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return positions and scores of the `k` best positive sums, best first, ties in order.

        terms may repeat, weights: one for each, 1 if None; mask (P,) says which passages may be found.
        -> (<= k,), (<= k,)
        """
        factors = np.ones(len(terms)) if weights is None else np.asarray(weights, np.float64)
        if self.postings.count <= self.exhaustive or (factors < 0).any():
            scores = self.postings.scores(terms, weights)
            found = best(scores, k, mask)
            return found, scores[found]
        candidates = self._candidates(np.asarray(terms, np.int64), factors, k, mask)
        scores = self.postings.scores_at(candidates, terms, weights)
        found = best(scores, k)
        return candidates[found], scores[found]

    def _candidates(
        self, terms: np.ndarray, factors: np.ndarray, k: int, mask: np.ndarray | None
    ) -> np.ndarray:
        """Return the positions, ascending, of passages that the `k` best are among."""
        rows, of_row = np.unique(terms, return_inverse=True)
        factors = np.bincount(of_row, weights=factors, minlength=len(rows))
        bounds = factors * [self._bound(row) for row in rows]
        order = [i for i in np.argsort(self.postings.lengths(rows), kind="stable") if bounds[i] > 0]
        rows, factors, bounds = rows[order], factors[order], bounds[order]
        slack = 1e-5 * bounds.sum()  # rounding in float32 is less
        left = np.append(np.cumsum(bounds[::-1])[::-1], 0) + slack  # what the terms from here on can add
        found, sums, used = self._add_up(rows, factors, left, k, mask)
        for at in range(used, len(rows)):
            if len(found) > k:
                keep = sums + left[at] >= np.partition(sums, -k)[-k]
                found, sums = found[keep], sums[keep]
            sums = sums + np.float32(factors[at]) * self.postings.look_up(rows[at], found)
        if len(found) > k:
            found = found[sums + left[-1] >= np.partition(sums, -k)[-k]]
        return np.sort(found)

    def _add_up(
        self, rows: np.ndarray, factors: np.ndarray, left: np.ndarray, k: int, mask: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Sum whole lists, the shortest first, until no other passage can be among the best.

        -> positions (N,), ascending, and their sums so far, and the number of terms that are in these
        """
        sums, parts, at = self._zeros(), [np.zeros(0, np.int32)], 0
        try:
            for at, (row, factor) in enumerate(zip(rows, factors, strict=True), 1):
                positions, weights = self.postings.list_of(row)
                if mask is not None:
                    allowed = mask[positions]
                    positions, weights = positions[allowed], weights[allowed]
                before = sums[positions]
                parts.append(positions[before == 0])
                sums[positions] = before + weights * np.float32(factor)
                if left[0] - left[at] > left[at] and sum(map(len, parts)) >= k:
                    found = np.concatenate(parts)
                    if np.partition(sums[found], -k)[-k] > left[at]:
                        break
            found = np.sort(np.concatenate(parts))
            return found, sums[found], at
        finally:
            for part in parts:
                sums[part] = 0

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
