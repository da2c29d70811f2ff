"""Retrievers that answer no better than chance: what a policy scores with them, search did not give it."""

from __future__ import annotations

import random

from data.corpus import Corpus
from data.records import Hit
from retriever_server.retriever import Query, Retriever


class NoPassages(Retriever):
    """The closed book: every search finds nothing."""

    generation = "none"

    def search(self, queries: list[Query], k: int) -> list[list[Hit]]:
        """An empty ranking for each query."""
        return [[] for _ in queries]


class RandomPassages(Retriever):
    """Passages drawn at random from a corpus; the same query always draws the same."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus, self.generation = corpus, f"random-{corpus.content_hash[:12]}"

    def search(self, queries: list[Query], k: int) -> list[list[Hit]]:
        """`k` different passages of the corpus for each query, each with score 0."""
        size = len(self.corpus)
        return [
            [
                Hit(self.corpus[position], 0.0, self.generation)
                for position in random.Random(query).sample(range(size), min(k, size))
            ]
            for query in queries
        ]
