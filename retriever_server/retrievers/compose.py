"""Retrievers made of retrievers: `Fuse` joins rankings, `Sharded` parts of a corpus, `Cached` remembers.

Each is a constructor, so a YAML file nests them (`opening.py`). Parts are asked side by side, in
threads of their own. The generation names every part, so a hit says all that had a share in it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections import ChainMap, OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from itertools import compress
from typing import Any, Literal

import numpy as np

from data.errors import ConfigError, DataError, RetrieverError, RetrieverTimeout, RetrieverUnavailable
from data.records import Hit, Item, Passage
from retriever_server.retriever import Filter, Query, Retriever

_log = logging.getLogger(__name__)

_IN_FLIGHT = 64  # searches that one part may have under way; a part that hangs takes no more threads

Rankings = list[list[Hit]]


class _Joined(Retriever):
    """What `Fuse` and `Sharded` share: parts that are asked at the same time."""

    def __init__(self, parts: list[Retriever], settings: Sequence[Any]) -> None:
        if not parts:
            raise ConfigError("parts: must be one or more retrievers")
        self.parts = parts
        self.waits = any(part.waits for part in parts)
        self._label = _label(self, settings)
        self._gates = [threading.Semaphore(_IN_FLIGHT) for _ in parts]

    @property
    def generation(self) -> str:
        """The names of all parts, and a hash of how they are joined."""
        return self._name([part.generation for part in self.parts])

    def _name(self, generations: Sequence[str]) -> str:
        return f"{self._label}({'+'.join(generations)})"

    def _ask(self, asked: Sequence[Sequence[Query]], k: int, where: Filter | None) -> list[Future[Rankings]]:
        """The search of each part for what it is asked, under way."""
        each = zip(self.parts, self._gates, asked, strict=True)
        return [_start(part, gate, queries, k, where) for part, gate, queries in each]

    def describe(self) -> dict[str, Any]:
        """What it is made of."""
        return {**super().describe(), "parts": [part.describe() for part in self.parts]}

    def close(self) -> None:
        """Close the parts."""
        for part in self.parts:
            part.close()


class Fuse(_Joined):
    """One ranking out of several over the same passages: the parts' ids must be those of one corpus.

    method rrf: a passage scores the sum of weight / (rrf_k + rank), ranks from 1 (Cormack et al. 2009).
    convex: the sum of weight * score, the scores of each part brought to one scale over its `depth` hits:
    `min-max` to [0, 1], `z-score` to mean 0 and spread 1. What a part did not find counts as its last hit.
    Ties keep the order of the parts. Raises RetrieverError where an id means different passages, or is empty.

    A text index and an index of screenshots go together: a text is asked of both, an image of the parts
    that take images. An id may name a text in one corpus and its image in another.
    """

    def __init__(
        self,
        parts: list[Retriever],
        method: Literal["rrf", "convex"] = "rrf",
        weights: list[float] | None = None,
        rrf_k: int = 60,
        normalize: Literal["min-max", "z-score"] = "min-max",
        depth: int = 100,
    ) -> None:
        """`weights`: one a part, all equal without; `depth`: hits taken from each part, at least k."""
        self.weights = [1.0] * len(parts) if weights is None else weights
        if len(self.weights) != len(parts) or min(self.weights, default=1) < 0:
            raise ConfigError(f"weights = {weights}: must be {len(parts)} numbers >= 0, one a part")
        if depth < 1 or rrf_k < 1:
            raise ConfigError(f"depth = {depth}, rrf_k = {rrf_k}: must be >= 1")
        how = rrf_k if method == "rrf" else normalize
        super().__init__(parts, [method, how, self.weights, depth])
        self.method, self.rrf_k, self.normalize, self.depth = method, rrf_k, normalize, depth

    def search(self, queries: Sequence[Query], k: int, where: Filter | None = None) -> Rankings:
        """The `k` passages of each query with the best joined score."""
        taken = [self._taken(part, queries) for part in self.parts]
        if not all(any(part) for part in zip(*taken, strict=True)):
            raise DataError("none of the retrievers that are fused takes images, and a query holds one")
        asked = [list(compress(queries, part)) for part in taken]
        futures = self._ask(asked, max(k, self.depth), where)
        found = [future.result() for future in futures]  # part, query that it took, rank
        generation = self._name([_answered(*pair) for pair in zip(self.parts, found, strict=True)])
        rows = [_spread(rankings, part) for rankings, part in zip(found, taken, strict=True)]
        return [self._join(rankings, k, generation) for rankings in zip(*rows, strict=True)]

    def takes_images(self) -> bool:
        """Whether one of the parts does."""
        return any(part.takes_images() for part in self.parts)

    @staticmethod
    def _taken(part: Retriever, queries: Sequence[Query]) -> list[bool]:
        """Whether each query is asked of the part."""
        holds = [isinstance(query, Item) for query in queries]
        refuses = any(holds) and not part.takes_images()
        return [not (refuses and held) for held in holds]

    def _join(self, rankings: Sequence[list[Hit]], k: int, generation: str) -> list[Hit]:
        passages, scores = {}, {}
        for ranking, weight in zip(rankings, self.weights, strict=True):
            worth, unfound = self._worth(ranking)
            for hit, value in zip(ranking, worth, strict=True):
                first = _one_passage(passages.get(hit.passage.id, hit.passage), hit.passage)
                passages[first.id] = first
                scores[first.id] = scores.get(first.id, 0.0) + weight * (value - unfound)
        best = sorted(scores, key=lambda passage_id: -scores[passage_id])[:k]
        return [Hit(passages[passage_id], scores[passage_id], generation) for passage_id in best]

    def _worth(self, ranking: list[Hit]) -> tuple[list[float], float]:
        """What each hit adds, and what a passage adds that is not among them."""
        if self.method == "rrf":
            return [1.0 / (self.rrf_k + rank) for rank in range(1, len(ranking) + 1)], 0.0
        scores = np.array([hit.score for hit in ranking], dtype=np.float64)
        if not len(scores):
            return [], 0.0
        if self.normalize == "min-max":
            spread = float(np.ptp(scores))
            return ((scores - scores.min()) / spread if spread else np.ones_like(scores)).tolist(), 0.0
        standard = (scores - scores.mean()) / (scores.std() or 1.0)
        return standard.tolist(), float(standard.min())


class Sharded(_Joined):
    """The parts of one corpus, each in an index of its own, searched as one and merged by score.

    A part that fails, or is slower than `deadline_seconds`, fails the search with an error that names it.
    With `allow_partial` the others answer instead: it is logged, counted (`partial_searches` in
    `describe()`), and the generation of every hit says `missing part N`. All parts missing is an error.
    Scores must be comparable: those of vectors are; BM25's differ a little with each part's statistics.
    """

    def __init__(
        self, parts: list[Retriever], deadline_seconds: float = 30.0, allow_partial: bool = False
    ) -> None:
        if deadline_seconds <= 0:
            raise ConfigError(f"deadline_seconds = {deadline_seconds}: must be > 0")
        super().__init__(parts, [])
        self.deadline_seconds, self.allow_partial, self.partial_searches = deadline_seconds, allow_partial, 0

    def search(self, queries: Sequence[Query], k: int, where: Filter | None = None) -> Rankings:
        """The best `k` of all parts for each query; raises RetrieverTimeout or RetrieverUnavailable."""
        futures = self._ask([queries] * len(self.parts), k, where)
        wait(futures, timeout=self.deadline_seconds)
        found, names, failures = [], [], []
        for number, (part, future) in enumerate(zip(self.parts, futures, strict=True), start=1):
            if (failure := self._failure(number, part, future)) is None:
                found.append(future.result())
                names.append(_answered(part, found[-1]))
            else:
                failures.append(failure)
                names.append(f"missing part {number}")
        if failures:
            self._report(failures, everything=not found)
        generation = self._name(names)
        return [_merge(rankings, k, generation) for rankings in zip(*found, strict=True)]

    def score(
        self, queries: Sequence[Query], passages: Sequence[Sequence[Passage]]
    ) -> list[dict[str, float]]:
        """As `Retriever.score`: each passage by the part that has it."""
        of_parts = [part.score(queries, passages) for part in self.parts]
        return [dict(ChainMap(*scores)) for scores in zip(*of_parts, strict=True)]

    def probe(self) -> None:
        """Raise where a part does not answer; with `allow_partial`, where none does."""
        failures = []
        for part in self.parts:
            try:
                part.probe()
            except RetrieverError as error:
                failures.append(error)
        if failures and (not self.allow_partial or len(failures) == len(self.parts)):
            raise failures[0]

    def takes_images(self) -> bool:
        """Whether all parts do."""
        return all(part.takes_images() for part in self.parts)

    def _failure(self, number: int, part: Retriever, future: Future) -> RetrieverError | None:
        where = f"part {number} of {len(self.parts)} ({part.generation})"
        if not future.done():
            return RetrieverTimeout(f"{where}: no answer within {self.deadline_seconds:g} s")
        error = future.exception()
        if isinstance(error, ConfigError | DataError):  # the caller's, as every part would say
            raise error
        if error is None or isinstance(error, RetrieverError):
            return error and type(error)(f"{where}: {error}")
        return RetrieverUnavailable(f"{where}: {type(error).__name__}: {error}")

    def _report(self, failures: list[RetrieverError], everything: bool) -> None:
        if everything or not self.allow_partial:
            raise type(failures[0])("; ".join(map(str, failures)))
        self.partial_searches += 1
        for failure in failures:
            _log.warning("answering without it: %s", failure)

    def describe(self) -> dict[str, Any]:
        """What it is made of, and how often it answered without a part."""
        return {**super().describe(), "partial_searches": self.partial_searches}


class Cached(Retriever):
    """Remembers the `size` rankings used last, by generation of what answers, query, k and filter.

    The generation names index, encoder, settings and corpus, so that what a swap replaced is never
    served, and one call never mixes two generations. Empty rankings are asked for again.
    """

    def __init__(self, retriever: Retriever, size: int = 100_000) -> None:
        if size < 1:
            raise ConfigError(f"size = {size}: must be >= 1")
        self.retriever, self.size, self.waits = retriever, size, retriever.waits
        self.hits = self.misses = 0
        self._kept: OrderedDict[tuple, list[Hit]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def generation(self) -> str:
        """That of the retriever behind: the cache changes no ranking."""
        return self.retriever.generation

    def search(self, queries: Sequence[Query], k: int, where: Filter | None = None) -> Rankings:
        """What the retriever behind finds, or found when it was last asked the same."""
        generation, asked = self.generation, (k, json.dumps(where, sort_keys=True))
        with self._lock:
            keys = {query: (generation, _short(query), *asked) for query in queries}
            known = {query: self._recall(key) for query, key in keys.items()}
            missing = [query for query, ranking in known.items() if ranking is None]
            hits = sum(known[query] is not None for query in queries)
            self.hits, self.misses = self.hits + hits, self.misses + len(queries) - hits
        if missing:
            fresh = self.retriever.search(missing, k, where)
            if any(hit.generation != generation for ranking in fresh for hit in ranking):
                # Swapped since the look-up, or part of it was missing: nothing of before goes with it.
                return fresh if missing == queries else self.retriever.search(queries, k, where)
            known |= dict(zip(missing, fresh, strict=True))
            with self._lock:
                for query, ranking in zip(missing, fresh, strict=True):
                    if ranking:
                        self._kept[keys[query]] = ranking
                while len(self._kept) > self.size:
                    self._kept.popitem(last=False)
        return [list(known[query] or []) for query in queries]

    def score(
        self, queries: Sequence[Query], passages: Sequence[Sequence[Passage]]
    ) -> list[dict[str, float]]:
        """As the retriever behind."""
        return self.retriever.score(queries, passages)

    def takes_images(self) -> bool:
        """As the retriever behind."""
        return self.retriever.takes_images()

    def _recall(self, key: tuple) -> list[Hit] | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def describe(self) -> dict[str, Any]:
        """The retriever behind, and how often it did not have to be asked."""
        counts = {"hits": self.hits, "misses": self.misses, "entries": len(self._kept)}
        return {**super().describe(), **counts, "retriever": self.retriever.describe()}

    def close(self) -> None:
        """Close the retriever behind."""
        self.retriever.close()


def _short(query: Query) -> Query:
    """Equal for equal queries: an image is remembered by its hash alone."""
    if isinstance(query, str) or isinstance(query.image, str):
        return query
    return replace(query, image=hashlib.sha256(query.image).digest())


def _spread(rankings: Rankings, taken: Sequence[bool]) -> Rankings:
    """A ranking a query: an empty one where the part was not asked."""
    each = iter(rankings)
    return [next(each) if asked else [] for asked in taken]


def _one_passage(first: Passage, other: Passage) -> Passage:
    """What two parts know of a passage: one its text, another its image. RetrieverError if they differ."""
    same = first.text.split() == other.text.split()
    apart = not (first.text and other.text) and (first.image or other.image)
    if not first.id or not (same or apart):
        raise RetrieverError(f"id {first.id!r} is not one passage to all parts: they differ in corpus")
    told, shown = (first, other) if first.text else (other, first)
    return told if told.image or not shown.image else replace(told, image=shown.image)


def _start(
    part: Retriever, gate: threading.Semaphore, queries: Sequence[Query], k: int, where: Filter | None
) -> Future[Rankings]:
    """The search of one part, under way in a thread that does not keep the process alive."""
    future: Future[Rankings] = Future()

    def run() -> None:
        try:
            found = part.search(queries, k, where)
            if len(found) != len(queries):
                raise RetrieverError(f"{part.generation}: {len(found)} rows for {len(queries)} queries")
            future.set_result(found)
        except BaseException as error:
            future.set_exception(error)
        finally:
            gate.release()

    if gate.acquire(blocking=False):
        threading.Thread(target=run, daemon=True).start()
    else:
        future.set_exception(RetrieverUnavailable(f"{_IN_FLIGHT} searches are under way already"))
    return future


def _answered(part: Retriever, rankings: Rankings) -> str:
    """The generation that gave these rankings: of the hits themselves, since it may have changed since."""
    return next((hit.generation for ranking in rankings for hit in ranking), part.generation)


def _merge(rankings: Sequence[list[Hit]], k: int, generation: str) -> list[Hit]:
    """The best `k` by score, an id once; ties in the order of the parts."""
    best: dict[str, Hit] = {}
    for hit in sorted((hit for ranking in rankings for hit in ranking), key=lambda hit: -hit.score):
        best.setdefault(hit.passage.id or str(len(best)), hit)
    return [replace(hit, generation=generation) for hit in list(best.values())[:k]]


def _label(retriever: Retriever, settings: Sequence[Any]) -> str:
    """The kind, and a hash of the settings that change its rankings."""
    name = type(retriever).__name__.lower()
    return f"{name}-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:6]}" if settings else name
