"""BM25 over `bm25s`: built and memory-mapped by it, scored here.

bm25s stores the weight of every (passage, word) pair, so that a search is a sum over the postings
of the query's words. The sum and the selection are ours because inside a training loop its
`retrieve` costs more around them than they do, and it leaves the order of equal scores open.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import Corpus
from data.errors import ConfigError, DataError
from data.records import Hit, Passage
from retriever_server.filters import allowed
from retriever_server.indexes.base import Index, Manifest, open_index, write_generation
from retriever_server.retriever import Filter, Query

_WORD = re.compile(r"\w+")


def plain(text: str) -> list[str]:
    """The words of a text, lower-cased, in normal form KC.   "Élan-vital" -> ["élan", "vital"]"""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def stopwords(text: str) -> list[str]:
    """As `plain`, without the 33 English stop words of Lucene. No stemming."""
    from bm25s.stopwords import STOPWORDS_EN

    dropped = frozenset(STOPWORDS_EN)
    return [word for word in plain(text) if word not in dropped]


ANALYZERS: dict[str, Callable[[str], list[str]]] = {"plain": plain, "stopwords": stopwords}


class BM25Index(Index):
    """Lexical search with Lucene's BM25: idf = ln(1 + (N - df + .5) / (df + .5)), no factor k1 + 1.

    A word that a query repeats counts as often as it stands there. Passages that share no word with
    the query are no hits; equal scores are ranked in corpus order. Scores are sums in float64.
    """

    def __init__(self, path: Path, manifest: Manifest, corpus: Corpus) -> None:
        stored = _bm25s().BM25.load(path, mmap=True, show_progress=False)
        self.manifest, self.corpus, self.generation = manifest, corpus, manifest.generation
        self._analyze = ANALYZERS[manifest.settings["analyzer"]]
        self._vocabulary: dict[str, int] = stored.vocab_dict
        # Plain array views of the memory maps: slicing np.memmap costs more than the sum itself.
        self._weights = stored.scores["data"].view(np.ndarray)
        self._positions = stored.scores["indices"].view(np.ndarray)
        self._starts = stored.scores["indptr"].view(np.ndarray)

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
        overwrite: bool = False,
        progress: Callable[[Iterable[Passage]], Iterable[Passage]] = iter,
    ) -> BM25Index:
        """Index title (`title_boost` times) and text of all passages into the folder `out`; opened.

        k1=.9, b=.4 are Anserini's defaults. `progress` wraps the passages as they are read.
        Raises ConfigError for a wrong setting, DataError for a corpus without words.
        """
        settings = _checked_settings(k1, b, analyzer, title_boost)

        def write(folder: Path) -> None:
            _write_bm25s(folder, corpus, settings, progress)

        write_generation(Path(out), "bm25", settings, corpus, write, overwrite)
        return open_index(out)  # type: ignore[return-value]

    def search(self, queries: list[Query], k: int, where: Filter | None = None) -> list[list[Hit]]:
        """The best `k` passages of each query, best first; none where it has no known word."""
        if k < 1:
            raise ConfigError(f"k = {k}: must be >= 1")
        mask = allowed(self.corpus, where) if where else None
        return [self._search_one(query, k, mask) for query in queries]

    def _search_one(self, query: Query, k: int, mask: np.ndarray | None) -> list[Hit]:
        known = (self._vocabulary.get(word) for word in self._analyze(query))
        spans = [(self._starts[word], self._starts[word + 1]) for word in known if word is not None]
        if not spans:
            return []
        scores = np.bincount(  # (P,) of the corpus
            np.concatenate([self._positions[start:end] for start, end in spans]),
            weights=np.concatenate([self._weights[start:end] for start, end in spans]),
            minlength=len(self.corpus),
        )
        if mask is not None:
            scores *= mask
        return [Hit(self.corpus[int(i)], float(scores[i]), self.generation) for i in _best(scores, k)]


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    """Positions of the `k` best positive scores, best first, ties in order.   (P,) -> (<=k,)"""
    k = min(k, len(scores))
    least = np.partition(scores, -k)[-k]
    candidates = np.flatnonzero(scores >= least) if least > 0 else np.flatnonzero(scores)
    return candidates[np.argsort(-scores[candidates], kind="stable")[:k]]


def _checked_settings(k1: float, b: float, analyzer: str, title_boost: int) -> dict:
    for ok, name, value, must_be in (
        (k1 >= 0, "k1", k1, ">= 0"),
        (0 <= b <= 1, "b", b, "in [0, 1]"),
        (analyzer in ANALYZERS, "analyzer", analyzer, f"one of {', '.join(ANALYZERS)}"),
        (title_boost >= 0, "title_boost", title_boost, ">= 0"),
    ):
        if not ok:
            raise ConfigError(f"{name} = {value}: must be {must_be}")
    return {"k1": float(k1), "b": float(b), "analyzer": analyzer, "title_boost": int(title_boost)}


def _write_bm25s(folder: Path, corpus: Corpus, settings: dict, progress: Callable) -> None:
    analyze, title_boost = ANALYZERS[settings["analyzer"]], settings["title_boost"]
    vocabulary: dict[str, int] = {}
    token_ids = []
    for passage in progress(corpus):
        words = analyze(passage.title) * title_boost + analyze(passage.text)
        token_ids.append(array("i", [vocabulary.setdefault(w, len(vocabulary)) for w in words]))
    if not vocabulary:
        raise DataError(f"{corpus.path}: {len(corpus)} passages without a single word")
    index = _bm25s().BM25(k1=settings["k1"], b=settings["b"], method="lucene")
    index.index((token_ids, vocabulary), create_empty_token=False, show_progress=False)
    index.save(folder, show_progress=False)


def _bm25s() -> Any:
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # its import sets DEBUG, over all settings
    return bm25s
