"""The statistics of BM25, and postings weighed anew where passages were added or deleted.

How often a word stands in a passage follows from its weight, as a whole number, so that the weight by the
statistics of all passages is to the last bit the one that an index built of all of them has.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from retriever_server.indexes.postings import Postings

_KEPT_BYTES, _LONG = 1 << 28, 1 << 12
"""Weights of long lists that are kept: of the first so many bytes, those of the most frequent words soon."""


@dataclass(frozen=True)
class Statistics:
    """Weights by idf * tf / (tf + k1 * (1 - b + b * length / average)).

    Analyzed as anserini, as Lucene counts: passages without a term are none, and lengths lose what a
    byte cannot hold.
    """

    k1: float
    b: float
    lucene: bool
    count: int
    """Passages."""
    average: float
    """Their tokens."""

    @staticmethod
    def of(lengths: np.ndarray, settings: dict[str, Any]) -> Statistics:
        """Return those of passages of so many tokens.   lengths (P,)"""
        lucene = settings["analyzer"] == "anserini"
        count = int(np.count_nonzero(lengths)) if lucene else len(lengths)
        average = lengths.sum(dtype=np.int64) / max(count, 1)
        return Statistics(settings["k1"], settings["b"], lucene, count, average or 1.0)

    def idf(self, frequencies: Any) -> Any:
        """Weigh words that stand in so many passages."""
        return np.log(1 + (self.count - frequencies + 0.5) / (frequencies + 0.5))

    def norms(self, lengths: np.ndarray) -> np.ndarray:
        """Return what is added to tf below the line, for passages of so many tokens."""
        stored = lucene_length(lengths) if self.lucene else lengths
        return self.k1 * (1 - self.b + self.b * stored / self.average)


def count_from(weights: np.ndarray, idf: Any, norms: np.ndarray) -> np.ndarray:
    """Return how often words stand in passages, from their weights there.   (N,) each; idf: or one for all"""
    share = weights / idf
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.rint(share * norms / (1 - share))
    return np.where((share < 1) & (found >= 1), found, 1)  # k1 = 0: it does not matter


@dataclass(frozen=True)
class Restated(Postings):
    """Postings of some passages, weighed by the statistics of more."""

    tokens: np.ndarray
    """(P,) tokens of each passage."""
    built: Statistics
    whole: Statistics
    frequency: Callable[[int], int]
    """Count the passages of the whole in which a term stands."""
    _kept: dict[int, np.ndarray] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def weigh(self, term: int, at: Any = slice(None)) -> np.ndarray:
        if (kept := self._kept.get(term)) is not None:
            return kept[at]
        span = slice(self.starts[term], self.starts[term + 1])
        lengths = self.tokens[self.positions[span][at]]
        idf = self.built.idf(int(span.stop - span.start))
        found = count_from(self.weights[span][at], idf, self.built.norms(lengths))
        weights = self.whole.idf(self.frequency(term)) * found / (found + self.whole.norms(lengths))
        weights = weights.astype(np.float32)
        if len(weights) == span.stop - span.start > _LONG:
            self._keep(term, weights)
        return weights

    def _keep(self, term: int, weights: np.ndarray) -> None:
        with self._lock:
            if sum(each.nbytes for each in self._kept.values()) + weights.nbytes <= _KEPT_BYTES:
                self._kept[term] = weights


def lucene_length(lengths: np.ndarray) -> np.ndarray:
    """Return the lengths that Lucene reads back from the byte it keeps of each: exact below 40.

    Above, 24 + what the four leading bits of length - 24 hold (Lucene's SmallFloat.intToByte4).
    100 -> 96, 1000 -> 984
    """
    above = np.maximum(lengths - 24, 1)
    dropped_bits = np.maximum(np.floor(np.log2(above)).astype(np.int64) - 3, 0)
    return np.where(lengths < 40, lengths, 24 + (above >> dropped_bits << dropped_bits))
