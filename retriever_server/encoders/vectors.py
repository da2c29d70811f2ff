"""The three representations of texts, by `EncodingSpec.kind`, and what is done with all alike.

dense: float32 (N, D).  sparse: scipy csr_array (N, V), weights >= 0.  multi: `Multi`, a vector a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Multi:
    """Vectors of the tokens of N texts: text i owns values[offsets[i]:offsets[i + 1]]."""

    values: np.ndarray
    """(T, D) float32"""
    offsets: np.ndarray
    """(N + 1,) int64"""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        """The vectors of text `i`.   (tokens, D)"""
        return self.values[self.offsets[i] : self.offsets[i + 1]]


Vectors = Any
"""np.ndarray | scipy.sparse.csr_array | Multi"""


def concatenate(parts: list[Vectors]) -> Vectors:
    """The vectors of all texts of `parts`, in order."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    if isinstance(parts[0], Multi):
        lengths = np.concatenate([np.diff(part.offsets) for part in parts])
        values = np.concatenate([part.values for part in parts])
        return Multi(values, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    from scipy.sparse import vstack

    return vstack(parts, format="csr")


def take(vectors: Vectors, rows: np.ndarray) -> Vectors:
    """The vectors of the texts `rows`, in this order."""
    if not isinstance(vectors, Multi):
        return vectors[rows]
    taken = [vectors[int(row)] for row in rows]
    return Multi(np.concatenate(taken), np.cumsum([0, *map(len, taken)], dtype=np.int64))


def no_vectors(kind: str, dimension: int, count: int = 0) -> Vectors:
    """The vectors of no text, or of `count` that have none: no token, or zeros."""
    if kind == "multi":
        return Multi(np.zeros((0, dimension), np.float32), np.zeros(count + 1, np.int64))
    none = np.zeros((count, dimension), np.float32)
    if kind == "dense":
        return none
    from scipy.sparse import csr_array

    return csr_array(none)


def similarities(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row of `a` with that of `b`; 1 for two zero rows, NaN stays.   (N, D) -> (N,)"""
    if a.shape != b.shape:
        return np.zeros(1)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = ~(a.any(axis=1) | b.any(axis=1))
    return np.where(both_zero, 1.0, (a * b).sum(axis=1) / np.where(lengths == 0, 1, lengths))


def rows_of(vectors: Vectors, i: int) -> np.ndarray:
    """Text `i` of any representation as a dense matrix."""
    if isinstance(vectors, Multi):
        return vectors[i]
    if isinstance(vectors, np.ndarray):
        return vectors[i : i + 1]
    return vectors[[i]].toarray()


def least_similarity(a: Vectors, b: Vectors) -> float:
    """Return the least cosine of a row of a text in `a` with the same in `b`; NaN where there is one."""
    count = len(a) if isinstance(a, Multi) else a.shape[0]
    return float(np.min([similarities(rows_of(a, i), rows_of(b, i)).min() for i in range(count)]))
