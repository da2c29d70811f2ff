"""A corpus of rivers, generators that write about it, and runs of the pipeline over it."""

from __future__ import annotations

import json
from pathlib import Path

from data.corpus import Corpus
from data.jsonl import write_jsonl
from retriever_server.indexes.base import open_index
from retriever_server.indexes.bm25 import BM25Index
from retriever_server.training.synthesis.config import SynthesisConfig
from retriever_server.training.synthesis.drafts import Written
from retriever_server.training.synthesis.generators import Generator
from retriever_server.training.synthesis.pipeline import Synthesis
from retriever_server.training.synthesis.results import write_results

NAMES = [f"{a}{b}o" for a in ("ama", "dan", "niger", "rhei", "vol") for b in ("dr", "lm", "st", "rt")]


def rivers(folder: Path) -> Corpus:
    rows = [
        {
            "id": name,
            "title": name,
            "text": f"The river {name} rises near Mount {name}us and is {90 + i} miles long.",
        }
        for i, name in enumerate(NAMES)
    ]
    write_jsonl(folder / "corpus.jsonl", rows)
    return Corpus(folder / "corpus.jsonl")


class Lengths(Generator):
    """Asks for the length of the river of the passage; stops like Ctrl-C where it is told to."""

    name = "lengths"

    def __init__(self, stops_after: int | None = None) -> None:
        self.calls, self.stops_after = 0, stops_after

    def write(self, calls):
        if self.stops_after is not None and self.calls >= self.stops_after:
            raise KeyboardInterrupt
        self.calls += len(calls)
        return [Written(self.text(call), len(call.prompt.split()), 9) for call in calls]

    def text(self, call):
        query = f"How many miles has river {call.passage.title}?"
        answer = call.passage.text.split()[-3]
        return json.dumps({"task": "Find lengths", "query": query, "answer": answer})


def run(folder: Path, generator: Generator, corpus: Corpus | None = None, judges=(), **fields) -> Synthesis:
    corpus = corpus or rivers(folder)
    index = folder / "bm25"
    if not index.exists():
        BM25Index.build(corpus, index)
    retriever = open_index(index)
    settings = {"recipe": "fret", "batch": 4, "candidates": 5, "least_characters": 1, **fields}
    config = SynthesisConfig(
        generator={"class_path": "x"}, corpus=str(corpus.path), out=str(folder / "out"), **settings
    )
    return Synthesis(config, generator, corpus, retriever, judges)


def synthesize(made: Synthesis) -> dict:
    return write_results(made, made.run())
