"""Learned sparse vectors (SPLADE and its kin), searched exactly through their postings, as BM25 is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import Corpus
from retriever_server.encoders.spec import EncodingSpec
from retriever_server.encoders.vectors import Vectors
from retriever_server.indexes.encoded import EncodedIndex, Ranking
from retriever_server.indexes.integrity import save_array
from retriever_server.indexes.postings import Postings, best, map_postings
from retriever_server.indexes.shards import Shards


class InvertedIndex(EncodedIndex):
    """Inner products of sparse vectors; passages that share no term with the query are no hits."""

    kind, vectors = "inverted", "sparse"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        starts, positions, weights = (
            np.load(self.path / f"{name}.npy", mmap_mode="r").view(np.ndarray)
            for name in ("starts", "positions", "weights")
        )
        self.postings = Postings(starts, positions, weights, self.manifest.corpus_count)

    @classmethod
    def checked_settings(cls, corpus: Corpus, spec: EncodingSpec) -> dict[str, Any]:
        """It has none."""
        return {}

    @classmethod
    def write(cls, folder: Path, shards: Shards, settings: dict[str, Any]) -> None:
        """The shards, sorted by term through the disk; weights are float32 whatever the dtype."""
        terms = shards.encoder.spec.dimension
        counts = sum(np.bincount(shards.load(i, "terms"), minlength=terms) for i in range(len(shards)))
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        save_array(folder / "starts.npy", starts)
        positions, weights = map_postings(folder, int(starts[-1]))
        free = starts[:-1].copy()
        for shard in range(len(shards)):
            order = np.argsort(shards.load(shard, "terms"), kind="stable")
            of_term = shards.load(shard, "terms")[order]
            passages = np.repeat(np.array(shards.positions(shard)), shards.load(shard, "lengths"))
            target = free[of_term] + np.arange(len(order)) - np.searchsorted(of_term, of_term)
            positions[target], weights[target] = passages[order], shards.load(shard, "weights")[order]
            free += np.bincount(of_term, minlength=terms)
        positions.flush()
        weights.flush()

    def rank(self, queries: Vectors, k: int, mask: np.ndarray | None = None) -> list[Ranking]:
        """As `EncodedIndex.rank`.   queries csr (Q, V)"""
        rankings = []
        for start, end in zip(queries.indptr[:-1], queries.indptr[1:], strict=True):
            scores = self.postings.scores(queries.indices[start:end], queries.data[start:end])
            found = best(scores, k, mask)
            rankings.append((found, scores[found]))
        return rankings

    def stored(self, position: int) -> np.ndarray:
        """The vector of a passage, by a search in every posting list.   (1, V)"""
        postings, row = self.postings, np.zeros((1, len(self.postings.starts) - 1), np.float32)
        for term, (start, end) in enumerate(zip(postings.starts[:-1], postings.starts[1:], strict=True)):
            at = start + np.searchsorted(postings.positions[start:end], position)
            if at < end and postings.positions[at] == position:
                row[0, term] = postings.weights[at]
        return row

    def __len__(self) -> int:
        return self.postings.count
