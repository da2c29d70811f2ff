"""BM25 at scale, in one run and in turns: all postings summed, MaxScore, and peers where they are installed.

    pip install bm25s tantivy
    python -m scripts.bench.bm25 --corpus corpus.jsonl --questions questions.jsonl --work runs/bm25

Passages are five sentences drawn from those of the corpus; queries are the questions as they stand. All
search the same words, those of the analyzer `plain`. tantivy has its own k1 and b (1.2, .75). What is made
is kept in `work`.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import Corpus
from data.jsonl import write_jsonl
from data.questions import load_questions
from retriever_server.indexes.analyzers import plain
from retriever_server.indexes.base import open_index
from retriever_server.indexes.bm25 import BM25Index
from scripts.bench.indexes import made_up_passages, resident

Search = Callable[[str], Any]
K = 10


def main(
    corpus: str,
    questions: str,
    work: str,
    count: int = 1_000_000,
    queries: int = 300,
    rounds: int = 3,
    threads: list[int] | None = None,
    systems: list[str] | None = None,
) -> None:
    """Print a line of Markdown for each system and number of threads: queries a second, median of the rounds.

    systems: any of exhaustive, maxscore, bm25s, tantivy; those installed if none is named.
    """
    folder = Path(work) / str(count)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "passages.jsonl").exists():
        write_jsonl(folder / "passages.jsonl", made_up_passages(Corpus(corpus), count))
    asked = [question.text for question in islice(load_questions(questions), queries)]
    passages = Corpus(folder / "passages.jsonl")
    found = {}
    for name in systems or ["exhaustive", "maxscore", "bm25s", "tantivy"]:
        if name in OPENED and (name not in PEERS or importlib.util.find_spec(name)):
            found[name] = OPENED[name](folder / name, passages)
    if {"exhaustive", "maxscore"} <= found.keys():
        assert all(found["exhaustive"](text) == found["maxscore"](text) for text in asked[:100])
    print(f"{count:,} passages, {len(asked)} questions, first {K}")
    print("| threads | system | queries/s | ms of a query, p50 | p95 |\n|---|---|---|---|---|")
    for number in threads or [1, 2]:
        rates: dict[str, list[float]] = {name: [] for name in found}
        times: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(rounds):
            for name, search in found.items():
                seconds, each = timed(search, asked, number)
                rates[name].append(len(asked) / seconds)
                times[name] += each
        for name in found:
            p50, p95 = 1000 * np.percentile(times[name], [50, 95])
            print(f"| {number} | {name} | {np.median(rates[name]):.0f} | {p50:.1f} | {p95:.1f} |", flush=True)
    print(f"memory: {resident('Anon'):,} MB of its own, {resident('File'):,} MB mapped, all systems together")


def timed(search: Search, queries: Sequence[str], threads: int) -> tuple[float, list[float]]:
    """Return the seconds of all queries together, and of each."""

    def one(text: str) -> float:
        start = time.perf_counter()
        search(text)
        return time.perf_counter() - start

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        each = list(pool.map(one, queries))
    return time.perf_counter() - start, each


def open_ours(folder: Path, passages: Corpus, exhaustive: bool = False) -> Search:
    """Return a search of our index, built next to `folder` if it is not there."""
    index = open_or_build(folder.parent / "ours", passages)
    if exhaustive:
        for part in index._parts:
            part.search.exhaustive = len(passages)
    return lambda text: [(int(p), float(s)) for p, s in zip(*index.find([text], K, None)[0], strict=True)]


def open_or_build(path: Path, passages: Corpus) -> BM25Index:
    """Return our index; prints the seconds of its building."""
    if not path.exists():
        start = time.perf_counter()
        BM25Index.build(passages, path, title_boost=0)
        print(f"built in {time.perf_counter() - start:.0f} s, {resident('Anon'):,} MB")
    return open_index(path)  # type: ignore[return-value]


def open_bm25s(folder: Path, passages: Corpus) -> Search:
    """Return a search of bm25s; it holds the index in memory."""
    import bm25s

    if not folder.exists():
        index = bm25s.BM25(k1=0.9, b=0.4)
        index.index([plain(passage.text) for passage in passages], show_progress=False)
        index.save(folder)
    index = bm25s.BM25.load(folder, mmap=True)
    return lambda text: index.retrieve([plain(text)], k=K, show_progress=False)


def open_tantivy(folder: Path, passages: Corpus) -> Search:
    """Return a search of tantivy, one segment, with the words of our analyzer."""
    import tantivy  # pyright: ignore[reportMissingImports]  # of a peer, not ours

    schema = tantivy.SchemaBuilder()
    schema.add_text_field("text", stored=False, tokenizer_name="whitespace", index_option="freq")
    schema.add_unsigned_field("position", stored=True)
    built = schema.build()
    if not folder.exists():
        folder.mkdir()
        writer = tantivy.Index(built, str(folder)).writer(heap_size=1 << 30, num_threads=1)
        for position, words in enumerate(words_of(passages)):
            writer.add_document(tantivy.Document(text=" ".join(words), position=position))
        writer.commit()
        writer.wait_merging_threads()
    index = tantivy.Index.open(str(folder))
    searcher = index.searcher()
    return lambda text: searcher.search(index.parse_query(" ".join(plain(text)), ["text"]), K)


def words_of(passages: Iterable[Any]) -> Iterable[list[str]]:
    """Yield the analyzed words of each passage."""
    return (plain(passage.text) for passage in passages)


PEERS = ("bm25s", "tantivy")
OPENED: dict[str, Callable[[Path, Corpus], Search]] = {
    "exhaustive": lambda folder, passages: open_ours(folder, passages, exhaustive=True),
    "maxscore": open_ours,
    "bm25s": open_bm25s,
    "tantivy": open_tantivy,
}

if __name__ == "__main__":
    from scripts.__main__ import run_script

    run_script(main)
