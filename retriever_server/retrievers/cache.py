"""`Cached`: a retriever that remembers what it was asked last."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from data.errors import require
from data.records import Hit, Passage
from retriever_server.retriever import Filter, Query, Retriever, Scores, Wrapper


class Cached(Wrapper):
    """Remembers the `size` rankings used last, by generation of what answers, query, k and filter.

    The generation names index, encoder, settings and corpus, so that what a swap replaced is never
    served, and one call never mixes two generations. Empty rankings are asked for again.
    """

    def __init__(self, retriever: Retriever, size: int = 100_000) -> None:
        require(size >= 1, "size", size, ">= 1")
        super().__init__(retriever)
        self.retriever, self.size = retriever, size
        self.hits = self.misses = 0
        self._kept: OrderedDict[tuple, list[Hit]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def generation(self) -> str:
        """The generation of the retriever behind: the cache changes no ranking."""
        return self.retriever.generation

    def search(self, queries: Sequence[Query], k: int, where: Filter | None = None) -> list[list[Hit]]:
        """Return what the retriever behind finds, or found when it was last asked the same."""
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

    def score(self, queries: Sequence[Query], passages: Sequence[Sequence[Passage]]) -> Scores:
        return self.retriever.score(queries, passages)

    def _recall(self, key: tuple) -> list[Hit] | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def describe(self) -> dict[str, Any]:
        counts = {"hits": self.hits, "misses": self.misses, "entries": len(self._kept)}
        return {**super().describe(), **counts, "retriever": self.retriever.describe()}


def _short(query: Query) -> Query:
    """Return a key of the query: an image is remembered by its hash alone."""
    if isinstance(query, str) or isinstance(query.image, str):
        return query
    return replace(query, image=hashlib.sha256(query.image).digest())
