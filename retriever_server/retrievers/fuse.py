"""`Fuse`: one ranking out of several over the same passages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from typing import Literal

import numpy as np

from data.errors import ConfigError, DataError, RetrieverError
from data.records import Hit, Item, Passage
from retriever_server.retriever import Filter, Query, Retriever
from retriever_server.retrievers.side_by_side import Rankings, SideBySide, generation_of


class Fuse(SideBySide):
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
        """Return the `k` passages of each query with the best joined score."""
        taken = [self._taken(part, queries) for part in self.parts]
        if not all(any(part) for part in zip(*taken, strict=True)):
            raise DataError("none of the retrievers that are fused takes images, and a query holds one")
        asked = [list(compress(queries, part)) for part in taken]
        futures = self._ask(asked, max(k, self.depth), where)
        found = [future.result() for future in futures]  # part, query that it took, rank
        generation = self._name([generation_of(*pair) for pair in zip(self.parts, found, strict=True)])
        rows = [_spread(rankings, part) for rankings, part in zip(found, taken, strict=True)]
        return [self._join(rankings, k, generation) for rankings in zip(*rows, strict=True)]

    def takes_images(self) -> bool:
        return any(part.takes_images() for part in self.parts)

    @staticmethod
    def _taken(part: Retriever, queries: Sequence[Query]) -> list[bool]:
        """Return whether each query is asked of the part."""
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
        """Return what each hit adds, and what a passage adds that is not among them."""
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


def _spread(rankings: Rankings, taken: Sequence[bool]) -> Rankings:
    """Return a ranking a query: an empty one where the part was not asked."""
    each = iter(rankings)
    return [next(each) if asked else [] for asked in taken]


def _one_passage(first: Passage, other: Passage) -> Passage:
    """Join what two parts know of a passage: its text, its image. RetrieverError if they differ."""
    same = first.text.split() == other.text.split()
    apart = not (first.text and other.text) and (first.image or other.image)
    if not first.id or not (same or apart):
        raise RetrieverError(f"id {first.id!r} is another passage in each part: their corpora differ")
    told, shown = (first, other) if first.text else (other, first)
    return told if told.image or not shown.image else replace(told, image=shown.image)
