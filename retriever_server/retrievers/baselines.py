"""Retrievers no better than chance, as baselines: what a policy scores with them is not owed to search."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from data.corpus import Corpus
from data.records import Hit
from retriever_server.filters import allowed
from retriever_server.retriever import Filter, Query, Retriever


class NoPassages(Retriever):
    """The closed book: every search finds nothing."""

    generation = "none"

    def search(self, queries: Sequence[Query], k: int, where: Filter | None = None) -> list[list[Hit]]:
        return [[] for _ in queries]


class RandomPassages(Retriever):
    """Passages drawn at random from a corpus; the same query always draws the same."""

    corpus: Corpus

    def __init__(self, corpus: Corpus) -> None:
        self.corpus, self.generation = corpus, f"random-{corpus.content_hash[:12]}"

    def search(self, queries: Sequence[Query], k: int, where: Filter | None = None) -> list[list[Hit]]:
        """`k` different passages of the corpus for each query, each with score 0."""
        drawn_from = np.flatnonzero(allowed(self.corpus, where)) if where else range(len(self.corpus))
        return [
            [
                Hit(self.corpus[int(drawn_from[i])], 0.0, self.generation)
                for i in random.Random(str(query)).sample(range(len(drawn_from)), min(k, len(drawn_from)))
            ]
            for query in queries
        ]
