"""Approximate dense search by faiss, each answer re-scored exactly from the stored vectors.

The index is any `faiss.index_factory` string; a candidate's own score, compressed, only decides whether
it is a candidate. A filtered search is exact: a product with the allowed vectors alone; so is one that faiss
finds too few passages for, and that of passages added since faiss was trained.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from data.corpus import Corpus
from data.errors import ConfigError
from retriever_server.encoders.spec import EncodingSpec
from retriever_server.indexes.base import Ranking, merge
from retriever_server.indexes.flat import FlatIndex
from retriever_server.indexes.shards import Shards
from retriever_server.indexes.vector_store import Rows
from retriever_server.retriever import Filter

_FILE = "faiss.index"
_TRAINING_VECTORS_A_LIST = 40  # faiss warns below 39
_ADDED_TOGETHER = 65536


def default_factory(count: int) -> str:
    """Choose a graph up to 50,000 passages, else sqrt(P) * 4 lists of 8 bits.   200_000 -> IVF2048,SQ8"""
    if count <= 50_000:
        return "HNSW32"
    return f"IVF{2 ** round(math.log2(4 * math.sqrt(count)))},SQ8"


def default_search(factory: str) -> str:
    """4 sqrt(lists) of the lists, or 128 nodes of a graph: recall@10 against `flat` was above .95.

    IVF4096,SQ8 -> nprobe=256; what has neither has no settings.   See docs/retrievers.md.
    """
    if lists := re.search(r"IVF(\d+)", factory):
        return f"nprobe={2 ** math.ceil(math.log2(4 * math.sqrt(int(lists[1]))))}"
    return "efSearch=128" if "HNSW" in factory else ""


class AnnIndex(FlatIndex):
    """Candidates by faiss, at least `candidates` and 4 k of them; their order by exact inner products."""

    kind, part_kind = "ann", "flat"

    def __init__(self, *args: Any, search: str | None = None, candidates: int = 100) -> None:
        """search: faiss's name=value settings, such as "nprobe=64"; None: those of the build."""
        super().__init__(*args)
        # Memory-mapped where faiss can; else it reads the file.
        self._faiss = faiss.read_index(str(self.folders[0] / _FILE), faiss.IO_FLAG_MMAP_IFC)
        _set_search(self._faiss, search or self.manifest.settings["search"])
        self._candidates = candidates
        mask = super()._mask(None)
        findable, added = np.ones(len(self), bool) if mask is None else mask, np.arange(len(self))
        added = added >= self._faiss.ntotal
        self._built, self._added = findable & ~added, findable & added

    @classmethod
    def part_settings(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Leave out what is for faiss."""
        return {name: value for name, value in settings.items() if name not in ("factory", "search")}

    @classmethod
    def checked_settings(
        cls, corpus: Corpus, spec: EncodingSpec, factory: str | None = None, search: str | None = None
    ) -> dict[str, Any]:
        """factory: for `faiss.index_factory`; search: its settings; see `default_factory`."""
        factory = factory or default_factory(len(corpus))
        search = search or default_search(factory)
        _set_search(_new(spec.dimension, factory), search)
        return {"factory": factory, "search": search}

    @classmethod
    def write(cls, folder: Path, shards: Shards, settings: dict[str, Any]) -> None:
        """Write the shards, and the index of faiss trained on a sample of them."""
        super().write(folder, shards, settings)
        rows = Rows([folder])
        index = _new(rows.dimension, settings["factory"])
        lists = getattr(faiss.try_extract_index_ivf(index), "nlist", 1024)
        size = max(lists, 1024) * _TRAINING_VECTORS_A_LIST
        sample = np.random.default_rng(0).permutation(len(rows))[:size]
        try:
            index.train(rows[np.sort(sample)])  # type: ignore[call-arg]
        except RuntimeError as error:
            reason = str(error).splitlines()[-1]
            given = f"factory = {settings['factory']}: cannot be trained on {len(sample)} vectors"
            raise ConfigError(f"{given} ({reason})") from error
        for start in range(0, len(rows), _ADDED_TOGETHER):
            index.add(rows[np.arange(start, min(start + _ADDED_TOGETHER, len(rows)))])  # type: ignore[call-arg]
        try:
            faiss.write_index(index, str(folder / _FILE))
        except RuntimeError as error:
            raise OSError(str(error).splitlines()[-1]) from error

    def rank(self, queries: np.ndarray, k: int, mask: np.ndarray | None = None) -> list[Ranking]:
        """As `EncodedIndex.rank`.   queries (Q, D)"""
        if mask is not None:
            return super().rank(queries, k, mask)
        count = min(max(self._candidates, 4 * k), len(self))
        _, found = self._faiss.search(np.ascontiguousarray(queries, np.float32), count)
        kept = (found >= 0) & self._built[found]
        ranked = [
            self.rows.score(row[of], query, k) for query, row, of in zip(queries, found, kept, strict=True)
        ]
        # A graph may miss nodes, a search lists; or passages that no search finds stand before all others.
        whole = min(k, int(self._built.sum()))
        short = [i for i, (rows, _) in enumerate(ranked) if len(rows) < whole]
        exact = super().rank(queries[short], k, self._built) if short else []
        for i, ranking in zip(short, exact, strict=True):
            ranked[i] = ranking
        if self._added.any():
            added = super().rank(queries, k, self._added)
            ranked = [merge(each, k) for each in zip(ranked, added, strict=True)]
        return ranked

    def _mask(self, where: Filter | None) -> np.ndarray | None:
        return super()._mask(where) if where else None  # skipped passages leave the candidates


def _new(dimension: int, factory: str) -> Any:
    try:
        return faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise ConfigError(f"factory = {factory}: not one of faiss.index_factory ({reason})") from error


def _set_search(index: Any, search: str) -> None:
    try:
        faiss.ParameterSpace().set_index_parameters(index, search)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise ConfigError(f"search = {search}: must be settings of this index ({reason})") from error
