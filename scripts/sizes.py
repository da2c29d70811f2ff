"""`sleuth sizes`: what each kind of index costs for so many passages, measured on a sample of vectors."""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data.errors import DataError, require
from data.jsonl import write_jsonl
from scripts.console import show_table

if TYPE_CHECKING:
    import numpy as np

_K, _QUERIES, _CANDIDATES = 10, 64, 100
_BYTES_A_WORD = 6.2  # of English text in JSON lines; title and keys are little beside it
_OFFSETS_BYTES = 32  # of a passage in the table of a corpus
_POSTING_BYTES = 8
_TERM_BYTES = 16
_TOKENS_A_WORD, _TOKEN_DIMENSION, _FIXED_ENCODING_BYTES = 1.3, 128, 2560
_SCALE_BYTES = 4  # of each vector in int8, and of each count of tokens
_SPARSE_TERMS = 120  # of a passage by SPLADE


class Row(NamedTuple):
    """One line of the table; bytes of all passages, seconds a query alone on one thread."""

    kind: str
    disk_bytes: float
    memory_bytes: float
    seconds: float | None
    recall: float | None
    note: str = ""


def main(
    passages: int,
    dimension: int = 768,
    encoder: str | None = None,
    vectors: str | None = None,
    words: int = 100,
    sample: int = 10_000,
) -> None:
    """Print disk, memory, latency and recall of each kind of index for a corpus of so many passages.

    Dense kinds are built and searched on a sample, and scaled up; the rest is calculated.

    Args:
        passages: How many the corpus has.
        dimension: Of the vectors.
        encoder: A sentence-transformers model whose dimension to take instead.
        vectors: A .npy file (N, D) of the corpus's own vectors to measure on; synthetic ones without.
        words: Of a passage.
        sample: How many vectors to measure on; 0 only calculates.
    """
    for name, value in (("passages", passages), ("dimension", dimension), ("words", words)):
        require(value >= 1, name, value, ">= 1")
    require(sample == 0 or sample >= 1000, "sample", sample, "0, or at least 1000")
    given = _load(vectors, sample) if vectors else None
    if encoder is not None:
        from retriever_server.encoders.loading import load_encoder

        dimension = load_encoder(encoder).spec.dimension
    dimension = given.shape[1] if given is not None else dimension
    rows = [*dense_rows(passages, dimension, sample, given), *other_rows(passages, words)]
    _show(rows, f"{passages:,} passages of {words} words, {dimension} dimensions", sample, vectors)


def dense_rows(passages: int, dimension: int, sample: int, given: np.ndarray | None = None) -> list[Row]:
    """The kinds of dense index, from `sample` vectors; with sample 0 by their formulas."""
    from retriever_server.indexes.ann import default_factory, default_search

    ann = default_factory(passages)
    scaled = passages * (dimension + _SCALE_BYTES)
    kinds = {
        "flat float32": 4 * passages * dimension,
        "flat float16": 2 * passages * dimension,
        "flat int8": scaled,
    }
    exact = {"flat float32": 1.0}
    rows = [Row(kind, size, size, None, exact.get(kind)) for kind, size in kinds.items()]
    stored = passages * dimension * 2
    for factory, size in ((ann, dimension), ("HNSW32", 4 * dimension + 4 * 64)):
        note = f"{default_search(factory)}, re-scored from float16 on disk"
        rows.append(Row(f"ann {factory}", passages * size + stored, passages * size, None, None, note))
    rows = list({row.kind: row for row in rows}.values())
    if not sample:
        return rows
    queries, base = _synthetic(sample, dimension) if given is None else (given[:_QUERIES], given[_QUERIES:])
    with tempfile.TemporaryDirectory(prefix="sleuth-sizes-") as folder:
        measure = _Measure(Path(folder), queries, base)
        return [
            row._replace(recall=recall, seconds=seconds * _growth(row.kind, len(base), passages))
            for row in rows
            for recall, seconds in [measure(row.kind)]
        ]


def other_rows(passages: int, words: int) -> list[Row]:
    """The kinds whose size depends on the text: calculated."""
    terms = 50 * math.sqrt(passages * words)  # Heaps' law
    bm25 = passages * 0.7 * words * _POSTING_BYTES  # most words of a passage stand there once
    bm25 += terms * _TERM_BYTES
    sparse = passages * _SPARSE_TERMS * _POSTING_BYTES
    fixed = passages * (_FIXED_ENCODING_BYTES + 2 * _SCALE_BYTES)
    multi = passages * _TOKENS_A_WORD * words * (_TOKEN_DIMENSION + _SCALE_BYTES)
    text = passages * (words * _BYTES_A_WORD + _OFFSETS_BYTES)
    return [
        Row("bm25", bm25, bm25, None, None, "another ranking, nothing to approximate"),
        Row("inverted", sparse, sparse, None, None, f"{_SPARSE_TERMS} terms a passage; exact"),
        Row("maxsim int8", multi + fixed, fixed, None, None, "128 a token; memory: encodings of 2,560 bytes"),
        Row("the corpus itself", text, 0, None, None, "read where there are hits; offsets in each index"),
    ]


class _Measure:
    """Builds real indexes over given vectors, and searches them beside the exact product."""

    def __init__(self, folder: Path, queries: np.ndarray, base: np.ndarray) -> None:
        import numpy as np

        from data.corpus import Corpus

        write_jsonl(folder / "corpus.jsonl", ({"id": str(i), "text": str(i)} for i in range(len(base))))
        self._folder, self._corpus = folder, Corpus(folder / "corpus.jsonl")
        self._queries, self._encoder = queries, _given_encoder(base)
        self._best = np.argpartition(-queries @ base.T, _K, axis=1)[:, :_K]

    def __call__(self, kind: str) -> tuple[float, float]:
        """recall@10 against the exact product, and seconds for one query alone."""
        from retriever_server.indexes.ann import AnnIndex
        from retriever_server.indexes.flat import FlatIndex

        name, _, how = kind.partition(" ")
        out = self._folder / kind.replace(" ", "-")
        if name == "flat":
            index = FlatIndex.build(self._corpus, out, self._encoder, dtype=how)
        else:
            factory = _scaled_factory(how, len(self._corpus))
            index = AnnIndex.build(self._corpus, out, self._encoder, factory=factory)
        start = time.perf_counter()
        rankings = [index.rank(query[None], _K)[0][0] for query in self._queries]
        seconds = (time.perf_counter() - start) / len(self._queries)
        found = zip(rankings, self._best, strict=True)
        return sum(len({*a.tolist()} & {*b.tolist()}) for a, b in found) / (_K * len(rankings)), seconds


def _given_encoder(base: np.ndarray) -> Any:
    """An encoder to which passage "7" is row 7."""
    from retriever_server.encoders.spec import Encoder, EncodingSpec

    class Given(Encoder):
        spec = EncodingSpec("given vectors", "dense", "given", base.shape[1])

        def encode(self, texts: list[str], role: str) -> np.ndarray:
            return base[[int(text) for text in texts]]

    return Given()


def _scaled_factory(factory: str, count: int) -> str:
    """The factory with the lists that suit `count` vectors.   IVF16384,SQ8, 10000 -> IVF512,SQ8"""
    if not factory.startswith("IVF"):
        return factory
    return f"IVF{2 ** round(math.log2(4 * math.sqrt(count)))},{factory.partition(',')[2]}"


def _growth(kind: str, measured: int, passages: int) -> float:
    """Return how much longer a search takes: by all vectors, by those of the lists searched, by the hops."""
    if kind.startswith("ann HNSW"):
        return max(1.0, math.log(passages) / math.log(measured))
    ratio = passages / measured
    return math.sqrt(ratio) if kind.startswith("ann IVF") else ratio


def _synthetic(count: int, dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries and vectors of length 1 around count / 20 centres, themselves around 30 directions."""
    import numpy as np

    rng = np.random.default_rng(0)
    directions = rng.standard_normal((30, dimension), dtype=np.float32)
    centres = directions[rng.integers(0, 30, max(30, count // 20))]
    centres = centres + rng.standard_normal(centres.shape, dtype=np.float32)
    drawn = centres[rng.integers(0, len(centres), count + _QUERIES)]
    drawn += 0.7 * rng.standard_normal(drawn.shape, dtype=np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return drawn[:_QUERIES], drawn[_QUERIES:]


def _load(path: str, sample: int) -> np.ndarray:
    import numpy as np

    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not a .npy file of vectors ({error})") from error
    if stored.ndim != 2 or len(stored) < 1000 or not stored.shape[1] or stored.dtype.kind not in "fiu":
        found = f"{stored.dtype} of shape {stored.shape}"
        raise DataError(f"{path}: holds {found}, expected numbers, at least 1000 vectors (N, D)")
    rows = np.random.default_rng(0).permutation(len(stored))[: (sample or 0) + _QUERIES]
    return stored[rows].astype(np.float32)


def _show(rows: list[Row], title: str, sample: int, vectors: str | None) -> None:
    from rich.filesize import decimal

    cells = []
    for row in rows:
        sizes = [decimal(int(size)) for size in (row.disk_bytes, row.memory_bytes)]
        seconds = "-" if row.seconds is None else f"{row.seconds * 1000:,.1f}"
        recall = "-" if row.recall is None else f"{row.recall:.3f}"
        cells.append([row.kind, *sizes, seconds, recall, row.note])
    show_table(title, ("kind", "disk", "memory", "ms a query", "recall@10", ""), cells)
    of = vectors or "synthetic vectors (clusters; your own with --vectors FILE.npy)"
    if sample:
        print(
            f"Recall and latency: measured on {sample:,} {of}, one query at a time on this machine; latency "
            "scaled up: flat by passages, IVF by their root, HNSW by their logarithm. Batches are faster. "
            "IVF searches a smaller share of its lists at full size: only a larger --sample tells its recall."
        )
    print("-: not measured. Memory: what should stay in the page cache; with less, it is slower.")
