"""BM25: a sum over the postings of a query's terms, memory-mapped.

    terms.npy        (V,) sorted hashes of the terms: a search for a term is a search in this array
    starts.npy positions.npy weights.npy   see `Postings`; a weight is that of Lucene's BM25

The weights equal those of bm25s. The building is ours because bm25s holds all passages in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import Corpus
from data.errors import ConfigError, DataError
from data.records import Hit, Passage
from retriever_server.filters import allowed
from retriever_server.indexes.analyzers import load_analyzer
from retriever_server.indexes.base import Index, Manifest, open_index, write_generation
from retriever_server.indexes.counting import count_terms, lucene_length
from retriever_server.indexes.postings import Postings, best
from retriever_server.retriever import Filter, Query

_LAYOUT = 2  # of the files; 1 was that of bm25s


class BM25Index(Index):
    """Lexical search with Lucene's BM25: idf = ln(1 + (N - df + .5) / (df + .5)), no factor k1 + 1.

    A word that a query repeats counts as often as it stands there. Passages that share no word with
    the query are no hits; equal scores are ranked in corpus order. Scores are sums in float64.
    """

    def __init__(self, path: Path, manifest: Manifest, corpus: Corpus) -> None:
        self.manifest, self.corpus, self.generation = manifest, corpus, manifest.generation
        settings = manifest.settings
        if settings.get("layout") != _LAYOUT:
            raise DataError(f"{path}: built by an older version of this program; build the index again")
        self._analyze = load_analyzer(settings["analyzer"], settings["language"])
        # Plain array views of the memory maps: slicing np.memmap costs more than the sum itself.
        self._terms, starts, positions, weights = (
            np.load(path / f"{name}.npy", mmap_mode="r").view(np.ndarray)
            for name in ("terms", "starts", "positions", "weights")
        )
        self._postings = Postings(starts, positions, weights, len(corpus))

    @classmethod
    def open(cls, path: Path, manifest: Manifest, corpus: Corpus) -> BM25Index:
        """The index in the folder `path`; call `open_index`, which checks it first."""
        return cls(path, manifest, corpus)

    @classmethod
    def build(
        cls,
        corpus: Corpus,
        out: str | Path,
        k1: float = 0.9,
        b: float = 0.4,
        analyzer: str = "plain",
        title_boost: int = 1,
        language: str = "none",
        overwrite: bool = False,
        progress: Callable[[Iterable[Passage]], Iterable[Passage]] = iter,
    ) -> BM25Index:
        """Index title (`title_boost` times) and text of all passages into the folder `out`; opened.

        k1=.9, b=.4 are Anserini's defaults; analyzer and language: see `analyzers`. With `anserini`
        lengths are rounded as Lucene stores them, in a byte. `progress` wraps the passages as they are
        read. Memory is bounded but for the vocabulary. Raises ConfigError for a wrong setting,
        DataError for a corpus without words.
        """
        settings = _checked_settings(k1, b, analyzer, title_boost, language)

        def write(folder: Path) -> None:
            write_postings(folder, corpus, settings, progress)

        write_generation(Path(out), "bm25", settings, corpus, write, overwrite)
        return open_index(out)  # type: ignore[return-value]

    def search(self, queries: list[Query], k: int, where: Filter | None = None) -> list[list[Hit]]:
        """The best `k` passages of each query, best first; none where it has no known word."""
        if k < 1:
            raise ConfigError(f"k = {k}: must be >= 1")
        mask = allowed(self.corpus, where) if where else None
        return [self._search_one(query, k, mask) for query in queries]

    def _search_one(self, query: Query, k: int, mask: np.ndarray | None) -> list[Hit]:
        terms = self._known(self._analyze(query))
        if not len(terms):
            return []
        scores = self._postings.scores(terms)
        return [Hit(self.corpus[int(i)], float(scores[i]), self.generation) for i in best(scores, k, mask)]

    def _known(self, words: list[str]) -> list[int]:
        """The rows of those words that the corpus has."""
        hashes = np.array([_hash(word) for word in words], np.uint64)
        rows = np.searchsorted(self._terms, hashes)
        rows[rows == len(self._terms)] = 0
        return rows[self._terms[rows] == hashes].tolist()


def write_postings(folder: Path, corpus: Corpus, settings: dict[str, Any], progress: Callable) -> None:
    """Count the terms of the corpus block by block on disk, then scatter the blocks into the postings."""
    analyze = load_analyzer(settings["analyzer"], settings["language"])
    with count_terms(folder, progress(corpus), analyze, settings["title_boost"]) as counts:
        if not counts.vocabulary:
            raise DataError(f"{corpus.path}: {len(corpus)} passages without a single word")
        hashes = np.fromiter(map(_hash, counts.vocabulary), np.uint64, len(counts.vocabulary))
        by_hash = np.argsort(hashes)
        row_of = np.argsort(by_hash)  # of each term in the vocabulary's order
        frequencies = counts.document_frequencies()[by_hash]
        starts = np.concatenate([[0], np.cumsum(frequencies)]).astype(np.int64)
        np.save(folder / "terms.npy", hashes[by_hash])
        np.save(folder / "starts.npy", starts)
        positions, weights = (
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (int(starts[-1]),))
            for name, dtype in (("positions", np.int32), ("weights", np.float32))
        )
        lucene = settings["analyzer"] == "anserini"
        idf, norms = _lucene_bm25(counts.lengths, frequencies, settings["k1"], settings["b"], lucene)
        free = starts[:-1].copy()
        for terms, passages, occurrences in counts.blocks():
            order = np.argsort(row_of[terms], kind="stable")
            rows, passages, occurrences = row_of[terms][order], passages[order], occurrences[order]
            target = free[rows] + np.arange(len(rows)) - np.searchsorted(rows, rows)
            positions[target] = passages
            weights[target] = idf[rows] * occurrences / (occurrences + norms[passages])
            free += np.bincount(rows, minlength=len(free))
        positions.flush()
        weights.flush()


def _lucene_bm25(
    lengths: np.ndarray, frequencies: np.ndarray, k1: float, b: float, lucene: bool
) -> tuple[np.ndarray, np.ndarray]:
    """idf of each term (V,) and k1 * (1 - b + b * length / average) of each passage (P,).

    lucene: as Lucene counts, passages without a term are none, and lengths lose what a byte cannot hold.
    """
    count = np.count_nonzero(lengths) if lucene else len(lengths)
    stored = lucene_length(lengths) if lucene else lengths
    idf = np.log(1 + (count - frequencies + 0.5) / (frequencies + 0.5))
    return idf, k1 * (1 - b + b * stored / (lengths.sum() / count))


def _hash(term: str) -> int:
    digest = hashlib.blake2b(term.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest)


def _checked_settings(k1: float, b: float, analyzer: str, title_boost: int, language: str) -> dict:
    load_analyzer(analyzer, language)
    for ok, name, value, must_be in (
        (k1 >= 0, "k1", k1, ">= 0"),
        (0 <= b <= 1, "b", b, "in [0, 1]"),
        (title_boost >= 0, "title_boost", title_boost, ">= 0"),
    ):
        if not ok:
            raise ConfigError(f"{name} = {value}: must be {must_be}")
    numbers = {"k1": float(k1), "b": float(b), "title_boost": int(title_boost)}
    return {**numbers, "analyzer": analyzer, "language": language, "layout": _LAYOUT}
