"""A corpus, examples and retrievers for the tests of mining."""

from __future__ import annotations

import time
from pathlib import Path

from data.corpus import Corpus
from data.examples import Examples
from data.jsonl import write_jsonl
from data.records import Hit
from retriever_server.retriever import Retriever
from retriever_server.retrievers.rerank import Scorer

COUNT = 30


class Numbered(Retriever):
    """Query "n" finds passages n, n+1, ... with falling scores; asked for a batch, it may fail or wait."""

    def __init__(self, corpus: str, seconds: float = 0.0, step: int = 1, name: str = "numbered") -> None:
        self.corpus, self.seconds, self.step, self.generation = Corpus(corpus), seconds, step, name
        self.batches: list[int] = []
        self.fails_after: int | None = None

    def search(self, queries, k, where=None):
        if self.fails_after is not None and len(self.batches) >= self.fails_after:
            raise KeyboardInterrupt
        self.batches.append(len(queries))
        time.sleep(self.seconds)
        return [self._rank(int(query), k, len(queries)) for query in queries]

    def _rank(self, first: int, k: int, batch: int) -> list[Hit]:
        count = len(self.corpus)
        # The batch leaves its mark on the scores, as it does on the last bit of a matrix product.
        scores = [100.0 - i + batch / 1000 for i in range(min(k, count))]
        passages = [self.corpus[(first + i * self.step) % count] for i in range(len(scores))]
        return [Hit(p, score, self.generation) for p, score in zip(passages, scores, strict=True)]


class Lengths(Scorer):
    """Scores a passage by its number: higher is better."""

    name = "numbers"

    def __init__(self) -> None:
        self.pairs = 0

    def score(self, pairs):
        self.pairs += len(pairs)
        return [float(passage.id) for _, passage in pairs]


def write_corpus(folder: Path, **texts: str) -> Corpus:
    rows = [{"id": str(i), "text": texts.get(f"p{i}", f"passage number {i}")} for i in range(COUNT)]
    write_jsonl(folder / "corpus.jsonl", rows)
    return Corpus(folder / "corpus.jsonl")


def write_examples(folder: Path, corpus: Corpus, count: int = 10, **fields) -> Examples:
    rows = [{"query_id": f"q{i}", "query": str(i), "positives": [str(i)], **fields} for i in range(count)]
    write_jsonl(folder / "examples.jsonl", rows)
    return Examples(folder / "examples.jsonl", corpus)
