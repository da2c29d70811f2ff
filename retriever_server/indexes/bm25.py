"""BM25 and TF-IDF: a sum over the postings of a query's terms, memory-mapped.

    terms.npy        (V,) sorted hashes of the terms: a search for a term is a search in this array
    starts.npy positions.npy weights.npy   see `Postings`; a weight is that of Lucene's BM25, or
                     (1 + ln tf) ln(N / df) over the length of the passage's vector of these

BM25's weights equal those of bm25s. The building is ours because bm25s holds all passages in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import Corpus, hash_text
from data.errors import ConfigError, DataError, require
from data.records import Passage
from retriever_server.indexes.analyzers import WORDS, load_analyzer, spaceless_share
from retriever_server.indexes.base import (
    Index,
    Manifest,
    Ranking,
    building,
    found_at,
    generation_name,
    open_index,
    write_generation,
)
from retriever_server.indexes.checksums import save_array
from retriever_server.indexes.postings import MaxScore, open_postings, write_postings
from retriever_server.indexes.term_counts import TermCounts, count_terms, lucene_length
from retriever_server.retriever import Query, texts_of

logger = logging.getLogger(__name__)
_LAYOUT = 2  # of the files; 1 was that of bm25s


class BM25Index(Index):
    """Lexical search with Lucene's BM25: idf = ln(1 + (N - df + .5) / (df + .5)), no factor k1 + 1.

    A word that a query repeats counts as often as it stands there. With `scoring` tfidf the score is the
    cosine of query and passage, both weighted by (1 + ln tf) ln(N / df) (Manning et al. 2008). Passages
    that share no word with the query are no hits; equal scores are ranked in corpus order. Scores are
    sums in float64.
    """

    def __init__(self, path: Path, manifest: Manifest, corpus: Corpus) -> None:
        self.manifest, self.corpus, self.generation = manifest, corpus, manifest.generation
        settings = manifest.settings
        if settings.get("layout") != _LAYOUT:
            raise DataError(f"{path}: built by an older version of this program; build the index again")
        self._analyze = load_analyzer(settings["analyzer"], settings["language"], settings.get("words", 1))
        self._cosine = settings.get("scoring") == "tfidf"
        self._terms = np.load(path / "terms.npy", mmap_mode="r").view(np.ndarray)
        self._postings = open_postings(path, len(corpus))
        self._search = MaxScore(self._postings)

    @classmethod
    def open(cls, path: Path, manifest: Manifest, corpus: Corpus) -> BM25Index:
        """Open the index in the folder `path`; call `open_index`, which checks it first."""
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
        scoring: str = "bm25",
        overwrite: bool = False,
        progress: Callable[[Iterable[Passage]], Iterable[Passage]] = iter,
    ) -> BM25Index:
        """Index title (`title_boost` times) and text of all passages into the folder `out`; opened.

        k1=.9, b=.4 are Anserini's defaults, and mean nothing to `scoring` tfidf, the other being bm25;
        analyzer and language: see `analyzers`. With `anserini` lengths are rounded as Lucene stores them,
        in a byte. `progress` wraps the passages as they are read. Memory is bounded but for the
        vocabulary. Raises ConfigError for a wrong setting,
        DataError for a corpus without words.
        """
        settings = _checked_settings(k1, b, analyzer, title_boost, language, scoring)
        _warn_of_spaceless(corpus, analyzer)

        def write(folder: Path) -> None:
            _write(folder, corpus, settings, progress)

        if found_at(Path(out), generation_name("bm25", settings, corpus.content_hash), overwrite) is None:
            with building(Path(out)):
                write_generation(Path(out), "bm25", settings, corpus, write, overwrite)
        return open_index(out)  # type: ignore[return-value]

    def find(self, queries: Sequence[Query], k: int, mask: np.ndarray | None) -> list[Ranking]:
        """As `PositionSearch.find`; nothing for a query without a known word."""
        asked = (self._weighed(query) for query in texts_of(queries, self.generation))
        return [self._search.top(terms, k, mask, weights) for terms, weights in asked]

    def score(
        self, queries: Sequence[Query], passages: Sequence[Sequence[Passage]]
    ) -> list[dict[str, float]]:
        """As `Retriever.score`; 0 for a passage that shares no word with the query."""
        scores = []
        for query, each in zip(texts_of(queries, self.generation), passages, strict=True):
            places = self.places(each)
            found = self._postings.scores_at(np.array([*places.values()], np.int32), *self._weighed(query))
            scores.append(dict(zip(places, found.tolist(), strict=True)))
        return scores

    def _weighed(self, query: str) -> tuple[list[int], list[float] | None]:
        """Return the terms of a query and their weights, 1 if None; those of a cosine for tfidf."""
        terms = self._terms_of(query)
        if not self._cosine or not terms:
            return terms, None
        rows, counts = np.unique(terms, return_counts=True)
        weights = (1 + np.log(counts)) * np.log(len(self.corpus) / self._postings.lengths(rows))
        length = np.linalg.norm(weights)
        return rows.tolist(), (weights / (length or 1)).tolist()

    def _terms_of(self, query: str) -> list[int]:
        """Return the rows of those words of the query that the corpus has."""
        hashes = np.array([hash_text(word) for word in self._analyze(query)], np.uint64)
        rows = np.searchsorted(self._terms, hashes)
        rows[rows == len(self._terms)] = 0
        return rows[self._terms[rows] == hashes].tolist()


def _write(folder: Path, corpus: Corpus, settings: dict[str, Any], progress: Callable) -> None:
    """Count the terms of the corpus block by block on disk, then scatter the blocks into the postings."""
    analyze = load_analyzer(settings["analyzer"], settings["language"])
    with count_terms(folder, progress(corpus), analyze, settings["title_boost"]) as counts:
        if not counts.vocabulary:
            raise DataError(f"{corpus.path}: {len(corpus)} passages without a single word")
        hashes = np.fromiter(map(hash_text, counts.vocabulary), np.uint64, len(counts.vocabulary))
        by_hash = np.argsort(hashes)
        row_of = np.argsort(by_hash)  # of each term in the vocabulary's order
        frequencies = counts.document_frequencies()
        save_array(folder / "terms.npy", hashes[by_hash])
        weigh = _SCORINGS[settings.get("scoring", "bm25")](counts, frequencies, settings)
        blocks = ((row_of[t], passages, weigh(t, passages, found)) for t, passages, found in counts.blocks())
        write_postings(folder, frequencies[by_hash], blocks)


Weigh = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Terms in the vocabulary's order, passages, and how often one stands in the other -> weights. (N,) each"""


def _lucene_bm25(counts: TermCounts, frequencies: np.ndarray, settings: dict[str, Any]) -> Weigh:
    """idf * tf / (tf + k1 * (1 - b + b * length / average)).

    Analyzed as anserini, as Lucene counts: passages without a term are none, and lengths lose what a
    byte cannot hold.
    """
    k1, b, lengths, lucene = settings["k1"], settings["b"], counts.lengths, settings["analyzer"] == "anserini"
    count = np.count_nonzero(lengths) if lucene else len(lengths)
    stored = lucene_length(lengths) if lucene else lengths
    idf = np.log(1 + (count - frequencies + 0.5) / (frequencies + 0.5))
    norms = k1 * (1 - b + b * stored / (lengths.sum() / count))
    return lambda terms, passages, occurrences: idf[terms] * occurrences / (occurrences + norms[passages])


def _tfidf(counts: TermCounts, frequencies: np.ndarray, settings: dict[str, Any]) -> Weigh:
    """(1 + ln tf) ln(N / df), over the length of the vector of these of the passage."""
    idf = np.log(len(counts.lengths) / frequencies)
    squares = np.zeros(len(counts.lengths))
    for terms, passages, occurrences in counts.blocks():
        weights = (1 + np.log(occurrences)) * idf[terms]
        squares += np.bincount(passages, weights**2, minlength=len(squares))
    lengths = np.sqrt(np.where(squares > 0, squares, 1))  # words that every passage has weigh nothing
    return lambda terms, passages, occurrences: (1 + np.log(occurrences)) * idf[terms] / lengths[passages]


_SCORINGS = {"bm25": _lucene_bm25, "tfidf": _tfidf}


def _warn_of_spaceless(corpus: Corpus, analyzer: str) -> None:
    sample = range(0, len(corpus), max(1, len(corpus) // 200))
    share = 0.0 if analyzer == "multilingual" else spaceless_share(corpus[i].contents[:2000] for i in sample)
    if share > 0.05:
        logger.warning(
            "%.0f %% of the letters of %s are of scripts without spaces between words, which the analyzer %s "
            "does not cut: take --analyzer multilingual",
            100 * share, corpus.path, analyzer,
        )  # fmt: skip


def _checked_settings(
    k1: float, b: float, analyzer: str, title_boost: int, language: str, scoring: str
) -> dict[str, Any]:
    load_analyzer(analyzer, language)
    require(k1 >= 0, "k1", k1, ">= 0")
    require(0 <= b <= 1, "b", b, "in [0, 1]")
    require(title_boost >= 0, "title_boost", title_boost, ">= 0")
    if scoring not in _SCORINGS:
        raise ConfigError(f"scoring {scoring!r}: must be one of {', '.join(_SCORINGS)}")
    common = {"title_boost": int(title_boost), "analyzer": analyzer, "language": language, "layout": _LAYOUT}
    common |= {} if analyzer == "anserini" else {"words": WORDS}
    if scoring == "bm25":  # not named in the settings: indexes are older than the choice
        return {"k1": float(k1), "b": float(b), **common}
    if (k1, b) != (0.9, 0.4):
        raise ConfigError(f"k1 = {k1}, b = {b}: mean nothing to scoring {scoring}")
    return {"scoring": scoring, **common}
