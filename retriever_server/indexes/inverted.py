"""Learned sparse vectors (SPLADE and its kin), searched exactly through their postings, as BM25 is.

What they weigh on disk can be cut: the largest `terms_per_passage` alone, and weights (impacts) of 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import Corpus, JoinedCorpus
from data.errors import require
from retriever_server.encoders.spec import EncodingSpec, Vectors
from retriever_server.indexes.base import Ranking, merge
from retriever_server.indexes.checksums import save_array
from retriever_server.indexes.encoded import EncodedIndex
from retriever_server.indexes.postings import Block, MaxScore, blocks_of, open_postings, write_postings
from retriever_server.indexes.shards import Shards


class InvertedIndex(EncodedIndex):
    """Inner products of sparse vectors; passages that share no term with the query are no hits."""

    kind = part_kind = "inverted"
    vectors = "sparse"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        starts = np.cumsum([0, *map(len, self.corpus.parts)]).tolist()
        of_parts = zip(self.folders, map(len, self.corpus.parts), starts, strict=False)
        self._searches = [MaxScore(open_postings(each, n), start=at) for each, n, at in of_parts]
        files = [folder / "scale.npy" for folder in self.folders]
        self._scales = [float(np.load(file)[0]) if file.exists() else 1.0 for file in files]
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
            blocks = ((t, p, _in_bits(weights, scale)) for t, p, weights in blocks)
        write_postings(folder, counts, blocks, np.uint8 if eight_bits else np.float32)

    def rank(self, queries: Vectors, k: int, mask: np.ndarray | None = None) -> list[Ranking]:
        """As `EncodedIndex.rank`.   queries csr (Q, V)"""
        asked = [
            (queries.indices[start:end], queries.data[start:end]) for start, end in pairwise(queries.indptr)
        ]
        searches = list(zip(self._searches, self._scales, strict=True))
        return [
            merge([search.top(terms, k, mask, weights * scale) for search, scale in searches], k)
            for terms, weights in asked
        ]

    def stored(self, position: int) -> np.ndarray:
        """Return the vector of a passage, by a search in every posting list.   (1, V)"""
        part = int(np.searchsorted([each.start for each in self._searches], position, side="right")) - 1
        postings, position = self._searches[part].postings, position - self._searches[part].start
        row = np.zeros((1, len(postings.starts) - 1), np.float32)
        for term, (start, end) in enumerate(pairwise(postings.starts)):
            at = start + np.searchsorted(postings.positions[start:end], position)
            if at < end and postings.positions[at] == position:
                row[0, term] = postings.weights[at] * self._scales[part]
        return row

    def write_merged(self, folder: Path) -> None:
        """As `Index.write_merged`; weights of 8 bits are rounded anew where the parts have other scales."""
        corpus = self.corpus
        assert isinstance(corpus, JoinedCorpus)
        self.save_skipped(folder)
        position_of, scale = corpus.places(), max(self._scales)
        eight_bits = self.manifest.dtype == "int8"
        if eight_bits:
            save_array(folder / "scale.npy", np.full(1, scale, np.float32))

        def blocks() -> Iterator[Block]:
            of_parts = zip(self._searches, self._scales, corpus.spans(), strict=True)
            for search, of, span in of_parts:
                for terms, passages, weights in blocks_of(search.postings, position_of[span]):
                    if eight_bits:
                        weights = _in_bits(weights * np.float32(of), scale)
                    yield terms, passages, weights

        counts = np.zeros(self.manifest.dimension, np.int64)
        for terms, _, _ in blocks():
            counts += np.bincount(terms, minlength=len(counts))
        write_postings(folder, counts, blocks(), np.uint8 if eight_bits else np.float32)

    def __len__(self) -> int:
        return sum(each.postings.count for each in self._searches)


def _in_bits(weights: np.ndarray, scale: Any) -> np.ndarray:
    return np.clip(np.rint(weights / scale), 1, 255)


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
