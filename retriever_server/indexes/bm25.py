"""BM25 and TF-IDF: a sum over the postings of a query's terms, memory-mapped.

    terms.npy        (V,) sorted hashes of the terms: a search for a term is a search in this array
    lengths.npy      (P,) tokens of each passage
    starts.npy positions.npy weights.npy   see `Postings`; a weight is that of Lucene's BM25, or
                     (1 + ln tf) ln(N / df) over the length of the passage's vector of these

BM25's weights equal those of bm25s. The building is ours because bm25s holds all passages in memory.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import Corpus, JoinedCorpus, hash_text
from data.errors import ConfigError, DataError, require
from data.records import Passage
from retriever_server.indexes.analyzers import WORDS, Analyzer, load_analyzer, spaceless_share
from retriever_server.indexes.base import Index, Ranking, merge, open_index
from retriever_server.indexes.bm25_statistics import Restated, Statistics, count_from
from retriever_server.indexes.checksums import save_array
from retriever_server.indexes.generation import building, found_at, write_generation
from retriever_server.indexes.manifest import Manifest, generation_name
from retriever_server.indexes.postings import Block, MaxScore, blocks_of, open_postings, write_postings
from retriever_server.indexes.shards import Progress, silent
from retriever_server.indexes.term_counts import TermCounts, count_terms
from retriever_server.retriever import Query, Scores, texts_of

logger = logging.getLogger(__name__)
LENGTHS = "lengths.npy"
_LAYOUT = 2  # of the files; 1 was that of bm25s


class BM25Index(Index):
    """Lexical search with Lucene's BM25: idf = ln(1 + (N - df + .5) / (df + .5)), no factor k1 + 1.

    A word that a query repeats counts as often as it stands there. With `scoring` tfidf the score is the
    cosine of query and passage, both weighted by (1 + ln tf) ln(N / df) (Manning et al. 2008). Passages
    that share no word with the query are no hits; equal scores are ranked in corpus order. Scores are
    sums in float64.
    """

    kind = part_kind = "bm25"

    def __init__(self, path: Path, manifest: Manifest, corpus: Corpus) -> None:
        self.path, self.manifest, self.corpus, self.generation = path, manifest, corpus, manifest.generation
        settings = manifest.settings
        if settings.get("layout") != _LAYOUT:
            raise DataError(f"{path}: built by an older version of this program; build the index again")
        self._analyze = _analyzer(settings)
        self._cosine = settings.get("scoring") == "tfidf"
        folders = manifest.folders(path)
        starts = np.cumsum([0, *map(len, corpus.parts)]).tolist()
        self._parts = [_Part(*each) for each in zip(folders, map(len, corpus.parts), starts, strict=False)]
        self._frequencies: dict[int, int] = {}
        if isinstance(corpus, JoinedCorpus):
            self._restate(corpus, [np.load(folder / LENGTHS) for folder in folders])

    def _restate(self, corpus: JoinedCorpus, lengths: list[np.ndarray]) -> None:
        """Weigh the postings of all parts by the statistics of what is left of all."""
        self._lengths, self._alive = np.concatenate(lengths), corpus.alive
        self._whole = Statistics.of(self._lengths[corpus.alive], self.manifest.settings)
        for part, each in zip(self._parts, lengths, strict=True):
            built = Statistics.of(each, self.manifest.settings)
            part.restate(each, built, self._whole, self._frequency)

    def _frequency(self, word: int) -> int:
        """Count the passages that a word stands in.   word: its hash"""
        if word not in self._frequencies:
            asked = np.array([word], np.uint64)
            of_parts = [
                part.start + part.postings.passages_of(row)
                for part in self._parts
                for row in part.rows_of(asked)
            ]
            self._frequencies[word] = sum(int(np.count_nonzero(self._alive[rows])) for rows in of_parts)
        return self._frequencies[word]

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
        progress: Progress = silent,
        processes: int = 1,
    ) -> BM25Index:
        """Index title (`title_boost` times) and text of all passages into the folder `out`; opened.

        k1=.9, b=.4 are Anserini's defaults, and mean nothing to `scoring` tfidf, the other being bm25;
        analyzer and language: see `analyzers`. With `anserini` lengths are rounded as Lucene stores them,
        in a byte. Memory is bounded but for the terms. A build that was killed goes on with the passages
        that are not counted; `processes` count them, with the same bytes as one. Raises ConfigError for a
        wrong setting, DataError for a corpus without words.
        """
        settings = _checked_settings(k1, b, analyzer, title_boost, language, scoring)
        require(processes >= 1, "processes", processes, "1 or more")
        _warn_of_spaceless(corpus, analyzer)

        out, generation = Path(out), generation_name("bm25", settings, corpus.content_hash)
        counts = out.absolute().with_name(f".{out.name}.counting-{generation}")

        def write(folder: Path) -> None:
            _write(folder, corpus, settings, counts, progress, processes)
            if not len(np.load(folder / "terms.npy", mmap_mode="r")):
                raise DataError(f"{corpus.path}: {len(corpus)} passages without a single word")

        found = found_at(out, generation, overwrite)
        if found is None or counts.exists():
            with building(out):
                if found is None:
                    write_generation(out, "bm25", settings, corpus, write, overwrite)
                shutil.rmtree(counts, ignore_errors=True)
        return open_index(out)  # type: ignore[return-value]

    def find(self, queries: Sequence[Query], k: int, mask: np.ndarray | None) -> list[Ranking]:
        """As `PositionSearch.find`; nothing for a query without a known word."""
        return [self._ranked(query, k, mask) for query in texts_of(queries, self.generation)]

    def _ranked(self, query: str, k: int, mask: np.ndarray | None) -> Ranking:
        words, rankings = self._words_of(query), []
        for part in self._parts:
            terms, weights = self._weighed(part, words)
            rankings.append(part.search.top(terms, k, mask, weights))
        return merge(rankings, k) if len(rankings) > 1 else rankings[0]

    def score(self, queries: Sequence[Query], passages: Sequence[Sequence[Passage]]) -> Scores:
        """As `Retriever.score`; 0 for a passage that shares no word with the query."""
        scores = []
        for query, each in zip(texts_of(queries, self.generation), passages, strict=True):
            places, words = self.places(each), self._words_of(query)
            rows, found = np.array([*places.values()], np.int32), np.zeros(len(places))
            for part in self._parts:
                inside = (rows >= part.start) & (rows < part.start + part.postings.count)
                at = rows[inside] - np.int32(part.start)
                found[inside] = part.postings.scores_at(at, *self._weighed(part, words))
            scores.append(dict(zip(places, found.tolist(), strict=True)))
        return scores

    def _weighed(self, part: _Part, words: np.ndarray) -> tuple[list[int], list[float] | None]:
        """Return the terms of a query and their weights, 1 if None; those of a cosine for tfidf."""
        terms = part.rows_of(words)
        if not self._cosine or not terms:
            return terms, None
        rows, counts = np.unique(terms, return_counts=True)
        weights = (1 + np.log(counts)) * np.log(len(self.corpus) / part.postings.lengths(rows))
        length = np.linalg.norm(weights)
        return rows.tolist(), (weights / (length or 1)).tolist()

    def _words_of(self, query: str) -> np.ndarray:
        return np.array([hash_text(word) for word in self._analyze(query)], np.uint64)

    @classmethod
    def write_part(cls, folder: Path, corpus: Corpus, settings: dict[str, Any], **_: Any) -> None:
        _write(folder, corpus, settings, folder / ".counts")
        shutil.rmtree(folder / ".counts")

    @classmethod
    def prepare(cls, path: Path, corpus: Corpus, settings: dict[str, Any]) -> list[str]:
        """As `Index.prepare`: the tokens of each passage, which indexes of earlier versions did not keep."""
        if settings.get("scoring") == "tfidf":
            given = "whose weights depend on all passages"
            raise ConfigError(f"{path}: scored by tfidf, {given}; build the index again")
        if not (path / LENGTHS).exists():
            analyze, boost = _analyzer(settings), settings["title_boost"]
            lengths = [len(analyze(each.title)) * boost + len(analyze(each.text)) for each in corpus]
            save_array(path / LENGTHS, np.array(lengths, np.int32))
        return [LENGTHS]

    def write_merged(self, folder: Path) -> None:
        """As `Index.write_merged`; to the last bit what is built of the passages."""
        corpus = self.corpus
        assert isinstance(corpus, JoinedCorpus)
        words, position_of = np.unique(np.concatenate([part.words for part in self._parts])), corpus.places()
        frequencies = np.zeros(len(words), np.int64)
        for part, span in zip(self._parts, corpus.spans(), strict=True):
            row_of = np.searchsorted(words, part.words)
            for terms, _, _ in blocks_of(part.postings, position_of[span]):
                frequencies += np.bincount(row_of[terms], minlength=len(words))
        left = frequencies > 0
        words, frequencies, lengths = words[left], frequencies[left], self._lengths[corpus.alive]
        save_array(folder / "terms.npy", words)
        save_array(folder / LENGTHS, lengths)

        def blocks() -> Iterator[Block]:
            idf, norms = self._whole.idf(frequencies), self._whole.norms(lengths)
            for part, span in zip(self._parts, corpus.spans(), strict=True):
                row_of = np.searchsorted(words, part.words)
                built = part.built
                built_idf = built.idf(np.diff(part.postings.starts))
                for terms, passages, weights in blocks_of(part.postings, position_of[span]):
                    tf = count_from(weights, built_idf[terms], built.norms(lengths[passages]))
                    terms = row_of[terms]
                    yield terms, passages, idf[terms] * tf / (tf + norms[passages])

        write_postings(folder, frequencies, blocks())


class _Part:
    """The words and postings of one of the indexes that are joined, or of the only one."""

    def __init__(self, folder: Path, count: int, start: int) -> None:
        self.words = np.load(folder / "terms.npy", mmap_mode="r").view(np.ndarray)
        """(V,) ascending hashes"""
        self.postings, self.start = open_postings(folder, count), start
        self.search = MaxScore(self.postings, start=start)

    def restate(
        self, lengths: np.ndarray, built: Statistics, whole: Statistics, frequency: Callable[[int], int]
    ) -> None:
        """Weigh by the statistics of more passages; frequency: of the word with a hash."""
        of = self.postings
        stated = Restated(
            of.starts, of.positions, of.weights, of.count, lengths, built, whole,
            lambda row: frequency(int(self.words[row])),
        )  # fmt: skip
        self.postings, self.built, self.search = stated, built, MaxScore(stated, start=self.start)

    def rows_of(self, words: np.ndarray) -> list[int]:
        rows = np.searchsorted(self.words, words)
        inside = np.flatnonzero(rows < len(self.words))
        return rows[inside][self.words[rows[inside]] == words[inside]].tolist()


def _analyzer(settings: dict[str, Any]) -> Analyzer:
    return load_analyzer(settings["analyzer"], settings["language"], settings.get("words", 1))


def _write(folder: Path, corpus: Corpus, settings: dict[str, Any], counted: Path, *how: Any) -> None:
    """Count the terms of the corpus in the folder `counted`, then scatter the counts into the postings."""
    counts = count_terms(counted, corpus, _analyzer(settings), settings["title_boost"], *how)
    frequencies = counts.document_frequencies()
    save_array(folder / "terms.npy", counts.words)
    save_array(folder / LENGTHS, counts.lengths.astype(np.int32))
    weigh = _SCORINGS[settings.get("scoring", "bm25")](counts, frequencies, settings)
    blocks = ((terms, passages, weigh(terms, passages, n)) for terms, passages, n in counts.blocks())
    write_postings(folder, frequencies, blocks)


Weigh = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Terms, passages, and how often one stands in the other -> weights. (N,) each"""


def _lucene_bm25(counts: TermCounts, frequencies: np.ndarray, settings: dict[str, Any]) -> Weigh:
    known = Statistics.of(counts.lengths, settings)
    idf, norms = known.idf(frequencies), known.norms(counts.lengths)
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
        raise ConfigError(f"k1 = {k1}, b = {b}: have no effect with scoring {scoring}")
    return {"scoring": scoring, **common}
