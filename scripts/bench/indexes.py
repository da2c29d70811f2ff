"""Indexes at scale: seconds to build, bytes, seconds to open, milliseconds a query, memory, recall.

    python -m scripts.bench.indexes --corpus corpus.jsonl --model MODEL_FOLDER --work runs/scale

The passages are sentences of real ones, drawn at random. The first `encoded` vectors are those of real
passages, the rest mixtures of two of them plus noise, of length 1: so they are made up, and clustered.
What is made is kept in `work`. Each index is opened and searched in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import random
import re
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import numpy as np

from data.corpus import Corpus
from data.jsonl import read_json, write_json, write_jsonl
from data.records import Input
from retriever_server.encoders.spec import Encoder, EncodingSpec, Role

NOISE = 0.5


class Given(Encoder):
    """Vectors that are made up already: a passage's title is its row, a query is the number of one.

    Under the model's spec, so that `sleuth serve` opens the index with the model itself (with `recheck: 0`,
    as it would not make these vectors of these passages).
    """

    def __init__(self, folder: Path) -> None:
        rows = {"passage": "vectors.npy", "query": "queries.npy"}
        self.rows = {role: np.load(folder / name, mmap_mode="r") for role, name in rows.items()}
        self.spec = EncodingSpec(**read_json(folder / "spec.json"))

    def encode(self, texts: Sequence[Input], role: Role) -> np.ndarray:
        """The rows that the texts name."""
        return np.array(self.rows[role][[int(str(text)) for text in texts]])


def main(
    corpus: str,
    model: str,
    work: str,
    count: int = 1_000_000,
    encoded: int = 20_000,
    queries: int = 200,
    kinds: list[str] | None = None,
    dtype: str = "int8",
) -> None:
    """Print a line of Markdown a kind (bm25, flat, ann)."""
    folder = Path(work)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "queries.npy").exists():
        make_vectors(folder, corpus, model, count, encoded, queries)
    if not (folder / "passages.jsonl").exists():
        write_jsonl(folder / "passages.jsonl", made_up_passages(Corpus(corpus), count))
    passages = Corpus(folder / "passages.jsonl")
    measured = "open s | p50 ms | p95 ms | queries/s (64 a batch) | MB of its own | MB mapped"
    print(f"| kind | build s | bytes | {measured} | recall@10 |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    exact: list[list[str]] = []
    for kind in kinds or ["bm25", "flat", "ann"]:
        start = time.perf_counter()
        build(kind, passages, folder, dtype)
        seconds = time.perf_counter() - start
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            measured, found = pool.submit(probe, kind, folder, queries).result()
        exact = found if kind == "flat" else exact
        recall = "" if kind == "bm25" or not exact else f"{overlap(found, exact):.3f}"
        size = sum(path.stat().st_size for path in (folder / kind).iterdir())
        print(f"| {kind} | {seconds:.0f} | {size:,} | {measured} | {recall} |", flush=True)


def make_vectors(folder: Path, corpus: str, model: str, count: int, encoded: int, queries: int) -> None:
    """Write vectors.npy (count, D), queries.npy (queries, D) and spec.json."""
    from retriever_server.encoders.loading import load_encoder

    encoder = load_encoder(model)
    texts = [encoder.spec.render_text(passage) for passage in islice(Corpus(corpus), encoded)]
    real = encoder.encode(texts, "passage")
    rng = np.random.default_rng(0)
    shape = (count, real.shape[1])
    vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, shape)
    vectors[: len(real)] = real[:count]
    for start in range(len(real), count, 100_000):
        vectors[start : start + 100_000] = mixtures(real, min(100_000, count - start), rng)
    vectors.flush()
    np.save(folder / "queries.npy", mixtures(real, queries, rng))
    write_json(folder / "spec.json", asdict(replace(encoder.spec, passage_template="{title}")))


def mixtures(real: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Unit vectors between two real ones each, plus noise of a length of NOISE."""
    a, b = real[rng.integers(len(real), size=(2, count))]
    share = rng.random((count, 1), np.float32)
    noise = rng.standard_normal((count, real.shape[1]), np.float32) * (NOISE / real.shape[1] ** 0.5)
    mixed = share * a + (1 - share) * b + noise
    return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)


def made_up_passages(corpus: Corpus, count: int):
    """Passages of five sentences each, drawn from those of the corpus."""
    rng = random.Random(0)
    sentences = [s for passage in islice(corpus, 20_000) for s in re.split(r"(?<=[.!?])\s+", passage.text)]
    for i in range(count):
        yield {"id": str(i), "title": str(i), "text": " ".join(rng.choices(sentences, k=5))}


def build(kind: str, passages: Corpus, folder: Path, dtype: str) -> None:
    """Build the index of a kind in `folder`/`kind`."""
    from retriever_server.indexes.manifest import index_kind

    if kind == "bm25":
        index_kind(kind).build(passages, folder / kind, title_boost=0)
    else:
        index_kind(kind).build(passages, folder / kind, Given(folder), dtype)


def probe(kind: str, folder: Path, queries: int) -> tuple[str, list[list[str]]]:
    """Open and search an index: a row of numbers, and the passages found."""
    from retriever_server.indexes.base import open_index

    start = time.perf_counter()
    index = open_index(folder / kind, **({} if kind == "bm25" else {"encoder": Given(folder)}))
    opened = time.perf_counter() - start
    asked = [str(i) for i in range(queries)]
    if kind == "bm25":
        asked = [" ".join(index.corpus[i * 997 % len(index.corpus)].text.split()[:8]) for i in range(queries)]
    index.search(asked[:8], 10)  # warm
    times, found = [], []
    for query in asked:
        start = time.perf_counter()
        [hits] = index.search([query], 10)
        times.append(1000 * (time.perf_counter() - start))
        found.append([hit.passage.id for hit in hits])
    start = time.perf_counter()
    for i in range(0, len(asked), 64):
        index.search(asked[i : i + 64], 10)
    rate = len(asked) / (time.perf_counter() - start)
    p50, p95 = np.percentile(times, [50, 95])
    memory = f"{resident('Anon'):,} | {resident('File'):,}"
    return f"{opened:.1f} | {p50:.1f} | {p95:.1f} | {rate:.0f} | {memory}", found


def resident(of: str) -> int:
    """Megabytes in memory now: Anon, of this process alone, or File, of maps, which may be dropped again."""
    [kilobytes] = re.findall(rf"Rss{of}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) // 1024


def overlap(found: list[list[str]], exact: list[list[str]]) -> float:
    """Share of the exact ten that were found."""
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, exact, strict=True)]))


if __name__ == "__main__":
    from scripts.__main__ import run_script

    run_script(main)
