"""Exact dense search: a matrix product with all vectors, which stay on disk, and the best of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import Corpus
from retriever_server.encoders.spec import EncodingSpec
from retriever_server.indexes.base import Ranking
from retriever_server.indexes.encoded import EncodedIndex
from retriever_server.indexes.shards import Shards
from retriever_server.indexes.vector_store import Rows


class FlatIndex(EncodedIndex):
    """Inner products with every passage, in float32 over fp32, fp16 or int8 vectors.

    Scores are cosines where the spec normalises. Larger than memory, as nothing but blocks is read.
    """

    kind = part_kind = "flat"
    vectors = "dense"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.rows = Rows(self.folders, device=self.device)

    @classmethod
    def checked_settings(cls, corpus: Corpus, spec: EncodingSpec) -> dict[str, Any]:
        return {}

    @classmethod
    def write(cls, folder: Path, shards: Shards, settings: dict[str, Any]) -> None:
        """Link the shards: they are the index."""
        shards.link_into(folder)

    def rank(self, queries: np.ndarray, k: int, mask: np.ndarray | None = None) -> list[Ranking]:
        return self.rows.search(queries, k, mask)

    def arrays(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return self.rows.arrays(rows)

    def stored(self, position: int) -> np.ndarray:
        """Return the vector of a passage.   (1, D)"""
        return self.rows[np.array([position])]

    def __len__(self) -> int:
        return len(self.rows)
