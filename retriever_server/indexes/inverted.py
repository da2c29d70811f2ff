"""Learned sparse vectors (SPLADE and its kin), searched exactly through their postings, as BM25 is.

What they weigh on disk can be cut: the largest `terms_per_passage` alone, and weights (impacts) of 8 bits.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import Corpus
from data.errors import require
from retriever_server.encoders.spec import EncodingSpec, Vectors
from retriever_server.indexes.checksums import save_array
from retriever_server.indexes.encoded import EncodedIndex, Ranking
from retriever_server.indexes.postings import MaxScore, open_postings, write_postings
from retriever_server.indexes.shards import Shards


class InvertedIndex(EncodedIndex):
    """Inner products of sparse vectors; passages that share no term with the query are no hits."""

    kind, vectors = "inverted", "sparse"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.postings = open_postings(self.path, self.manifest.corpus_count)
        self._search = MaxScore(self.postings)
        scale = self.path / "scale.npy"
        self.scale = float(np.load(scale)[0]) if scale.exists() else 1.0
        self.whole = "terms_per_passage" not in self.manifest.settings

    @classmethod
    def checked_settings(
        cls, corpus: Corpus, spec: EncodingSpec, terms_per_passage: int | None = None
    ) -> dict[str, Any]:
        """terms_per_passage: so many of the largest weights are kept of each passage; None keeps all."""
        if terms_per_passage is None:
            return {}
        require(terms_per_passage >= 1, "terms_per_passage", terms_per_passage, ">= 1")
        return {"terms_per_passage": terms_per_passage}

    @classmethod
    def write(cls, folder: Path, shards: Shards, settings: dict[str, Any]) -> None:
        """Write the shards, sorted by term through the disk.

        Weights are float32, or with dtype int8 of 8 bits: 1 to 255 times one scale for all.
        """
        shards.link_into(folder, "*.skipped.npy")
        terms = shards.encoder.spec.dimension
        limit, eight_bits = settings.get("terms_per_passage"), settings["dtype"] == "int8"
        counts, largest = np.zeros(terms, np.int64), np.float32(0)
        for shard in range(len(shards)):
            of_term, _, impacts = _largest(shards, shard, limit)
            counts += np.bincount(of_term, minlength=terms)
            largest = max(largest, impacts.max(initial=0))
        scale = np.full(1, largest / 255, np.float32)
        blocks = (_largest(shards, shard, limit) for shard in range(len(shards)))
        if eight_bits:
            save_array(folder / "scale.npy", scale)
            blocks = ((t, p, np.clip(np.rint(weights / scale), 1, 255)) for t, p, weights in blocks)
        write_postings(folder, counts, blocks, np.uint8 if eight_bits else np.float32)

    def rank(self, queries: Vectors, k: int, mask: np.ndarray | None = None) -> list[Ranking]:
        """As `EncodedIndex.rank`.   queries csr (Q, V)"""
        return [
            self._search.top(queries.indices[start:end], k, mask, queries.data[start:end] * self.scale)
            for start, end in pairwise(queries.indptr)
        ]

    def stored(self, position: int) -> np.ndarray:
        """Return the vector of a passage, by a search in every posting list.   (1, V)"""
        postings, row = self.postings, np.zeros((1, len(self.postings.starts) - 1), np.float32)
        for term, (start, end) in enumerate(zip(postings.starts[:-1], postings.starts[1:], strict=True)):
            at = start + np.searchsorted(postings.positions[start:end], position)
            if at < end and postings.positions[at] == position:
                row[0, term] = postings.weights[at] * self.scale
        return row

    def __len__(self) -> int:
        return self.postings.count


def _largest(shards: Shards, shard: int, limit: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return terms, passages and weights of a shard, the `limit` largest weights of each passage."""
    lengths = np.array(shards.load(shard, "lengths"))
    terms, weights = (np.array(shards.load(shard, name)) for name in ("terms", "weights"))
    passages = np.repeat(np.array(shards.positions(shard)), lengths)
    if limit is None:
        return terms, passages, weights
    by_weight = np.lexsort((-weights, passages))
    rank = np.arange(len(weights)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    kept = np.sort(by_weight[rank < limit])
    return terms[kept], passages[kept], weights[kept]
