"""The base of all indexes: search by positions in a corpus, filters, opening with checks, changes."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data.atomic import stamp_of
from data.corpus import Corpus, JoinedCorpus
from data.errors import ConfigError, DataError, SleuthError, require
from data.offsets import hash_file
from data.records import Hit, Passage
from retriever_server.filters import allowed
from retriever_server.indexes.checksums import check_files
from retriever_server.indexes.manifest import MANIFEST, Manifest, index_kind, part_manifests, read_manifest
from retriever_server.retriever import Filter, Query, Retriever

Ranking = tuple[np.ndarray, np.ndarray]
"""Rows of the index and scores, best first. (<= k,), (<= k,)"""


def merge(rankings: Iterable[Ranking], k: int) -> Ranking:
    """Return the `k` best of several rankings of different passages; equal scores in order of rows."""
    rows, scores = (np.concatenate(each) for each in zip(*rankings, strict=True))
    order = np.lexsort((rows, -scores))[:k]
    return rows[order], scores[order]


class PositionSearch(Retriever):
    """Finds positions in a corpus that lies here."""

    corpus: Corpus

    def search(self, queries: Sequence[Query], k: int, where: Filter | None = None) -> list[list[Hit]]:
        """Return the best `k` passages of each query among those that `where` allows, best first."""
        require(k >= 1, "k", k, ">= 1")
        rankings = self.find(queries, k, self._mask(where)) if queries else []
        return [
            [Hit(self.corpus[i], s, self.generation) for i, s in zip(*self._positions(ranked), strict=True)]
            for ranked in rankings
        ]

    @abstractmethod
    def find(self, queries: Sequence[Query], k: int, mask: np.ndarray | None) -> list[Ranking]:
        """Rank the best `k` rows that `mask` (R,) allows for each query."""

    def _mask(self, where: Filter | None) -> np.ndarray | None:
        """Mark the rows that a search may find, those of the corpus's positions; None for all."""
        mask = allowed(self.corpus, where) if where else None
        if isinstance(self.corpus, JoinedCorpus) and self.corpus.rows is not None:
            if mask is None:
                return self.corpus.alive
            rows, mask = self.corpus.rows[mask], np.zeros(len(self.corpus.alive), bool)
            mask[rows] = True
        return mask

    def _positions(self, ranked: Ranking) -> tuple[list[int], list[float]]:
        rows, scores = ranked
        found = np.searchsorted(self.corpus.rows, rows) if self.corpus.rows is not None else rows
        return found.tolist(), scores.tolist()


class Index(PositionSearch):
    """A retriever over an index on disk."""

    manifest: Manifest
    path: Path
    options: dict[str, Any]
    """Arguments that it was opened with."""
    kind: ClassVar[str]
    part_kind: ClassVar[str]
    """Kind of index that passages are added as."""

    @classmethod
    def part_settings(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of what is added to an index of these settings."""
        return settings

    @classmethod
    @abstractmethod
    def open(cls, path: Path, manifest: Manifest, corpus: Corpus) -> Index:
        """Return the index in the folder `path`; manifest and corpus were checked by `open_index`."""

    @classmethod
    @abstractmethod
    def write_part(cls, folder: Path, corpus: Corpus, settings: dict[str, Any], **how: Any) -> None:
        """Put the files of an index of added passages into `folder`."""

    @classmethod
    def prepare(cls, path: Path, corpus: Corpus, settings: dict[str, Any]) -> list[str]:
        """Write what an index needs before it is changed; return the names of the files."""
        return []

    @abstractmethod
    def write_merged(self, folder: Path) -> None:
        """Put the files of an unchanged index of the same passages into `folder`."""

    def add(self, passages: Sequence[Passage], replaces: bool = False) -> Index:
        from retriever_server.indexes import living

        living.add(self.path, passages, self.encoder, replaces)
        return self.reopened()

    def delete(self, ids: Sequence[str]) -> Index:
        from retriever_server.indexes import living

        living.delete(self.path, ids)
        return self.reopened()

    def compact(self) -> Index:
        from retriever_server.indexes import living

        if (first := living.due(self.corpus)) is None:
            return self
        living.compact(self.path, first)
        return self.reopened()

    def reopened(self) -> Index:
        """Return what lies at its place now, opened as it was."""
        return open_index(self.path, **self.options)

    def row(self, position: int) -> int:
        return position if self.corpus.rows is None else int(self.corpus.rows[position])

    def places(self, passages: Sequence[Passage]) -> dict[str, int]:
        """Return the row of each passage that is in the corpus with the same text, by id."""
        positions = self.corpus.positions([each.id for each in passages]).tolist()
        found = ((each, at) for each, at in zip(passages, positions, strict=True) if at >= 0)
        return {
            each.id: self.row(at) for each, at in found
            if not each.text or (text := self.corpus[at].text) == each.text or not text
        }  # fmt: skip

    def describe(self) -> dict[str, Any]:
        manifest = self.manifest
        return {
            **super().describe(),
            "kind": manifest.kind,
            "settings": manifest.settings,
            "passages": manifest.corpus_count,
            "corpus_hash": manifest.corpus_hash,
        }


def open_index(path: str | Path, **options: Any) -> Index:
    """Return the index in the folder `path`, ready to search; `options` are those of `open` of its kind.

    Raises ConfigError where there is no index, DataError where it or its corpus has changed.
    """
    path = Path(path)
    while True:
        found = stamp_of(path / MANIFEST)
        try:
            index = _open(path, options)
        except (SleuthError, OSError, ValueError):
            if stamp_of(path / MANIFEST) == found:
                raise
        else:
            if stamp_of(path / MANIFEST) == found:
                return index
            index.close()  # another one came meanwhile: some files may be of the new one


def _open(path: Path, options: dict[str, Any]) -> Index:
    from retriever_server.indexes.open_corpus import open_corpus

    manifest = read_manifest(path)
    check_parts(path, manifest, every_byte=False)
    kind = index_kind(manifest.kind)
    for name in options:
        if not any(name in inspect.signature(takes).parameters for takes in (kind.open, kind.__init__)):
            raise ConfigError(f"{path}: {name} is no option of an index of kind {manifest.kind}")
    index = kind.open(path, manifest, open_corpus(path, manifest), **options)
    index.options = options
    return index


def verify_index(path: str | Path) -> Manifest:
    """Read every byte of the index and its corpus; raises DataError naming the first file that differs."""
    from retriever_server.indexes.open_corpus import open_corpus

    path = Path(path)
    manifest = read_manifest(path)
    if manifest.files and not manifest.checksums:
        raise DataError(f"{path}: was built without checksums; build it again")
    check_parts(path, manifest, every_byte=True)
    whole = open_corpus(path, manifest)
    for corpus in whole.parts:
        if hash_file(corpus.path) != corpus.content_hash:
            raise DataError(f"{corpus.path}: not the corpus of {path}, though of its size; index it again")
    return manifest


def check_parts(path: Path, manifest: Manifest, every_byte: bool) -> None:
    """Check the files of an index, and of all that it joins, as `check_files`."""
    others = [each for each in part_manifests(path, manifest) if each[0] != path]
    for folder, part in [(path, manifest), *others]:
        check_files(folder, part.files, part.samples, part.checksums, every_byte)
