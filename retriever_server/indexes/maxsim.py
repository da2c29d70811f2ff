"""Late interaction: a vector a token, a query's score the sum over its tokens of the best match.

Candidates come from fixed-dimensional encodings (MUVERA, Dhulipala et al. 2024): one vector a passage
whose inner product with the query's approaches MaxSim. They are re-scored by exact MaxSim.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import Corpus
from data.errors import require
from retriever_server.encoders.spec import EncodingSpec, Multi
from retriever_server.indexes.base import Ranking
from retriever_server.indexes.checksums import save_array
from retriever_server.indexes.encoded import EncodedIndex
from retriever_server.indexes.shards import Shards, quantise
from retriever_server.indexes.vector_store import Rows

_PASSAGES_TOGETHER = 64


class FixedEncoding:
    """Token vectors into one: SimHash puts tokens into buckets, anew in every repetition.

    A query's bucket is the sum of its tokens, a passage's their mean; an empty bucket of a passage is
    that of the nearest one in Hamming distance (MUVERA takes one token of it). Each bucket is projected
    by random signs. Dimensions: repetitions x 2^bits x projection.
    """

    def __init__(self, dimension: int, repetitions: int, bits: int, projection: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.bits = bits
        self.planes = rng.standard_normal((repetitions, dimension, bits)).astype(np.float32)
        signs = rng.choice(np.array([-1, 1], np.float32), (repetitions, dimension, projection))
        self.signs = signs / np.float32(np.sqrt(projection))
        codes = np.arange(2**bits)
        self._distances = np.array([[bin(a ^ b).count("1") for b in codes] for a in codes])

    def encode(self, multi: Multi, is_query: bool) -> np.ndarray:
        """One vector a text.   -> (N, repetitions * 2^bits * projection)"""
        parts = [self._one(multi, is_query, *each) for each in zip(self.planes, self.signs, strict=True)]
        return np.concatenate(parts, axis=1)

    def _one(self, multi: Multi, is_query: bool, planes: np.ndarray, signs: np.ndarray) -> np.ndarray:
        from scipy.sparse import csr_array

        count, buckets, tokens = len(multi), 2**self.bits, len(multi.values)
        bucket = (multi.values @ planes > 0) @ (1 << np.arange(self.bits))  # (T,)
        slot = np.repeat(np.arange(count), np.diff(multi.offsets)) * buckets + bucket
        members = csr_array(
            (np.ones(tokens, np.float32), (slot, np.arange(tokens))), shape=(count * buckets, tokens)
        )
        sums = (members @ (multi.values @ signs)).reshape(count, buckets, -1)
        if not is_query:
            sizes = np.bincount(slot, minlength=count * buckets).reshape(count, buckets)
            sums = sums / np.maximum(sizes, 1)[:, :, None]
            far = np.where(sizes[:, None, :] > 0, self._distances, self.bits + 1)  # (N, bucket, other)
            sums = np.take_along_axis(sums, far.argmin(2)[:, :, None], axis=1)
        return sums.reshape(count, -1).astype(np.float32)


class MaxSimIndex(EncodedIndex):
    """sum_i max_j q_i . p_j, exact over `candidates` passages of the largest fixed encodings.

    With candidates >= P, or 0, it is exact over all. Token vectors lie ragged in memory-mapped shards.
    """

    kind = part_kind = "maxsim"
    vectors = "multi"
    passages_per_shard = 5_000

    def __init__(self, *args: Any, candidates: int = 256) -> None:
        """candidates: so many passages are scored, at least k; 0 for all."""
        super().__init__(*args)
        require(candidates >= 0, "candidates", candidates, ">= 0 (0: every passage is scored)")
        self.candidates = candidates
        self.tokens = Rows(self.folders)
        self.fixed = Rows(self.folders, "fde", self.device)
        lengths = [np.load(file) for each in self.folders for file in sorted(each.glob("*.lengths.npy"))]
        self.offsets = _offsets(np.concatenate(lengths))
        self._encoding = _encoding(self.manifest.dimension, self.manifest.settings)

    @classmethod
    def checked_settings(
        cls, corpus: Corpus, spec: EncodingSpec, repetitions: int = 10, bits: int = 4, projection: int = 16
    ) -> dict[str, Any]:
        """Sizes of `FixedEncoding`: 2,560 bytes a passage."""
        settings = {"repetitions": repetitions, "bits": bits, "projection": projection}
        for name, value in settings.items():
            most = 12 if name == "bits" else 1024
            require(1 <= value <= most, name, value, f"from 1 to {most}")
        return settings

    @classmethod
    def write(cls, folder: Path, shards: Shards, settings: dict[str, Any]) -> None:
        """Write the shards, and for each the fixed encodings of its passages in int8."""
        shards.link_into(folder)
        encoding, tokens, end = _encoding(shards.encoder.spec.dimension, settings), Rows([folder]), 0
        for shard in range(len(shards)):
            parts = []
            lengths = shards.load(shard, "lengths")
            for at in range(0, len(lengths), _PASSAGES_TOGETHER):
                offsets = _offsets(lengths[at : at + _PASSAGES_TOGETHER])
                start, end = end, end + int(offsets[-1])
                parts.append(encoding.encode(Multi(tokens.span(start, end), offsets), is_query=False))
            for name, array in quantise(np.concatenate(parts), "int8", "fde").items():
                save_array(folder / f"{shard:05d}.{name}.npy", array)

    def rank(self, queries: Multi, k: int, mask: np.ndarray | None = None) -> list[Ranking]:
        allowed = np.flatnonzero(mask) if mask is not None else np.arange(len(self))
        candidates: Any = [allowed] * len(queries)
        if self.candidates and len(allowed) > (count := max(self.candidates, k)):
            candidates = self.fixed.candidates(self._encoding.encode(queries, is_query=True), count, mask)
        return [self._rank_one(queries[i], each, k) for i, each in enumerate(candidates)]

    def _rank_one(self, query: np.ndarray, candidates: np.ndarray, k: int) -> Ranking:
        candidates = np.sort(candidates)
        candidates = candidates[self.offsets[candidates + 1] > self.offsets[candidates]]
        starts = range(0, len(candidates), _PASSAGES_TOGETHER)
        scores = np.concatenate(
            [np.zeros(0), *(self._maxsim(query, candidates[i : i + _PASSAGES_TOGETHER]) for i in starts)]
        )
        order = np.argsort(-scores, kind="stable")[:k]
        return candidates[order], scores[order]

    def _maxsim(self, query: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Exact scores of passages that have tokens.   query (T, D) -> (N,)"""
        firsts = _offsets(self.offsets[positions + 1] - self.offsets[positions])[:-1]  # among the tokens
        products = query @ self.tokens[self._tokens_of(positions)].T
        return np.maximum.reduceat(products, firsts, axis=1).sum(axis=0, dtype=np.float64)

    def _tokens_of(self, positions: np.ndarray) -> np.ndarray:
        """Return the rows of the tokens of some passages.   (N,) -> (T,)"""
        starts, lengths = self.offsets[positions], self.offsets[positions + 1] - self.offsets[positions]
        return np.repeat(starts - _offsets(lengths)[:-1], lengths) + np.arange(lengths.sum())

    def arrays(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        lengths = np.diff(self.offsets)[rows].astype(np.int32)
        return {**self.tokens.arrays(self._tokens_of(rows)), "lengths": lengths}

    def stored(self, position: int) -> np.ndarray:
        """Return the vectors of a passage's tokens.   (tokens, D)"""
        return self.tokens.span(int(self.offsets[position]), int(self.offsets[position + 1]))

    def __len__(self) -> int:
        return len(self.offsets) - 1


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _encoding(dimension: int, settings: dict[str, Any]) -> FixedEncoding:
    return FixedEncoding(dimension, settings["repetitions"], settings["bits"], settings["projection"])
