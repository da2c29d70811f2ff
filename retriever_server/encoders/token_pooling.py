"""Fewer vectors a page: those of its tokens pooled to a factor, before they are stored.

A page is a thousand vectors of late interaction; near ones say nearly the same. What is pooled has length
1 again. Queries are never pooled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.errors import ConfigError

METHODS = ("rows", "kmeans", "hierarchical")
_ROUNDS = 20


@dataclass(frozen=True)
class TokenPooling:
    """Pooling of the vectors of a passage to about one in `factor`; as text "rows:4".

    rows: the mean of each `factor` patches side by side, text tokens stay as they are; with as many as a
    row of the image has, one vector a row. kmeans: clusters by cosine. hierarchical: Ward's clusters on
    cosine distances, as sentence-transformers' `HierarchicalTokenPooling` (Clavié et al. 2024).
    """

    method: str
    factor: int

    @staticmethod
    def parse(text: str) -> TokenPooling | None:
        """ "kmeans:4" -> TokenPooling("kmeans", 4); "" -> None. Raises ConfigError."""
        if not text:
            return None
        method, _, factor = text.partition(":")
        if method not in METHODS or not factor.isdecimal() or not 2 <= int(factor) <= 1024:
            allowed = f"one of {', '.join(METHODS)}, a colon and a factor from 2 to 1024, as rows:4"
            raise ConfigError(f"token_pooling {text!r}: must be {allowed}")
        return TokenPooling(method, int(factor))

    def pool(self, vectors: np.ndarray, is_patch: np.ndarray) -> np.ndarray:
        """The pooled vectors of one passage, of length 1.   (T, D), (T,) bool -> (about T / factor, D)"""
        if len(vectors) < 2:
            return vectors
        if self.method == "hierarchical":
            return _hierarchical(vectors, self.factor)
        of = _runs(is_patch, self.factor) if self.method == "rows" else _nearest(vectors, self.factor)
        return _means(vectors, of)


def _means(vectors: np.ndarray, of: np.ndarray) -> np.ndarray:
    """The directions of the means of clusters.   (T, D), cluster of each (T,) -> (C, D)"""
    sums = np.zeros((int(of.max()) + 1, vectors.shape[1]), np.float32)
    np.add.at(sums, of, vectors)
    return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)


def _runs(is_patch: np.ndarray, factor: int) -> np.ndarray:
    """Numbers of runs of at most `factor` patches; a text token is one alone, and ends a run.

    [text, patch, patch, patch, text], 2 -> [0, 1, 1, 2, 3]
    """
    starts = np.ones(len(is_patch), bool)
    since = 0  # patches in the run so far
    for i, patch in enumerate(is_patch.tolist()):
        starts[i] = not patch or since % factor == 0
        since = since + 1 if patch else 0
    return np.cumsum(starts) - 1


def _nearest(vectors: np.ndarray, factor: int) -> np.ndarray:
    """Clusters by cosine (k-means), begun with tokens at even distances: the same every time."""
    count = max(len(vectors) // factor, 1)
    centres = vectors[np.linspace(0, len(vectors) - 1, count).round().astype(int)]
    of = np.full(len(vectors), -1)
    for _ in range(_ROUNDS):
        now = (vectors @ centres.T).argmax(axis=1)
        if (now == of).all():
            break
        of = now
        means, used = _means(vectors, of), np.unique(of)  # a cluster that lost all keeps its centre
        centres[used] = means[used]
    return np.unique(of, return_inverse=True)[1]


def _hierarchical(vectors: np.ndarray, factor: int) -> np.ndarray:
    import torch
    from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling

    pooling = HierarchicalTokenPooling(factor, num_protected_tokens=0)
    return pooling.pool_one(torch.from_numpy(np.ascontiguousarray(vectors))).numpy()
