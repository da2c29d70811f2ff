"""An index on disk is a generation: a folder whose manifest is written last and checked on opening.

The generation's name is a hash of what made it: the kind of index, its settings and the contents of
its corpus. A folder without a manifest is no index: an interrupted build leaves nothing that opens.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.atomic import new_folder, stamp_of
from data.columns import METADATA, save_columns
from data.corpus import Corpus
from data.errors import ConfigError, DataError, SleuthError, StorageError
from data.jsonl import read_json, write_json
from data.lock import locked
from data.records import FORMAT_VERSION, Hit, Passage
from retriever_server.filters import allowed
from retriever_server.indexes.checksums import check_files, file_hash, sample_hash
from retriever_server.retriever import Filter, Query, Retriever

if TYPE_CHECKING:
    from retriever_server.encoders.spec import EncodingSpec

MANIFEST = "manifest.json"
INDEX_KINDS = {
    "bm25": "retriever_server.indexes.bm25:BM25Index",
    "flat": "retriever_server.indexes.flat:FlatIndex",
    "ann": "retriever_server.indexes.ann:AnnIndex",
    "inverted": "retriever_server.indexes.inverted:InvertedIndex",
    "maxsim": "retriever_server.indexes.maxsim:MaxSimIndex",
}
"""kind -> module:class, imported only when an index of that kind is opened."""


@dataclass(frozen=True)
class Manifest:
    """The settings and files of an index."""

    kind: str
    settings: dict[str, Any]
    corpus_path: str
    """Absolute; tried after `corpus_relative_path`, so that a folder with both can be moved."""
    corpus_relative_path: str
    corpus_hash: str
    corpus_bytes: int
    corpus_count: int
    generation: str
    files: dict[str, int]
    """Name -> size in bytes of every file beside the manifest."""
    format_version: int = FORMAT_VERSION
    samples: dict[str, str] = field(default_factory=dict)
    """Name -> hash of sampled blocks, compared on opening."""
    checksums: dict[str, str] = field(default_factory=dict)
    """Name -> SHA-256, compared by `verify_index`."""
    spec: dict[str, Any] = field(default_factory=dict)
    """The `EncodingSpec` of the encoder, if one made the index."""
    spec_hash: str = ""
    dtype: str = ""
    dimension: int = 0
    checksum: str = ""
    """Hash of all the other fields."""

    @property
    def own_hash(self) -> str:
        """The right `checksum`."""
        fields = json.dumps(asdict(self) | {"checksum": ""}, sort_keys=True)
        return hashlib.sha256(fields.encode()).hexdigest()[:16]


Ranking = tuple[np.ndarray, np.ndarray]
"""Positions and scores, best first. (<= k,), (<= k,)"""


class PositionSearch(Retriever):
    """Finds positions in a corpus that lies here."""

    corpus: Corpus

    def search(self, queries: Sequence[Query], k: int, where: Filter | None = None) -> list[list[Hit]]:
        """Return the best `k` passages of each query among those that `where` allows, best first."""
        if k < 1:
            raise ConfigError(f"k = {k}: must be >= 1")
        rankings = self.find(queries, k, self._mask(where)) if queries else []
        return [
            [Hit(self.corpus[int(i)], float(s), self.generation) for i, s in zip(*ranked, strict=True)]
            for ranked in rankings
        ]

    @abstractmethod
    def find(self, queries: Sequence[Query], k: int, mask: np.ndarray | None) -> list[Ranking]:
        """Rank the best `k` positions that `mask` (P,) allows for each query."""

    def _mask(self, where: Filter | None) -> np.ndarray | None:
        """Mark the passages that a search may find; None for all."""
        return allowed(self.corpus, where) if where else None


class Index(PositionSearch):
    """A retriever over an index on disk."""

    manifest: Manifest

    @classmethod
    @abstractmethod
    def open(cls, path: Path, manifest: Manifest, corpus: Corpus) -> Index:
        """Return the index in the folder `path`; manifest and corpus were checked by `open_index`."""

    def places(self, passages: Sequence[Passage]) -> dict[str, int]:
        """Return the position of each passage that is in the corpus with the same text, by id."""
        positions = self.corpus.positions([each.id for each in passages]).tolist()
        found = ((each, at) for each, at in zip(passages, positions, strict=True) if at >= 0)
        return {
            each.id: at for each, at in found
            if not each.text or (text := self.corpus[at].text) == each.text or not text
        }  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """Describe its settings and corpus."""
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
    manifest = read_manifest(path)
    check_files(path, manifest.files, manifest.samples, manifest.checksums, every_byte=False)
    kind = index_kind(manifest.kind)
    for name in options:
        if not any(name in inspect.signature(takes).parameters for takes in (kind.open, kind.__init__)):
            raise ConfigError(f"{path}: {name} is no option of an index of kind {manifest.kind}")
    return kind.open(path, manifest, _open_corpus(path, manifest), **options)


def verify_index(path: str | Path) -> Manifest:
    """Read every byte of the index and its corpus; raises DataError naming the first file that differs."""
    path = Path(path)
    manifest = read_manifest(path)
    if not manifest.checksums:
        raise DataError(f"{path}: was built without checksums; build it again")
    check_files(path, manifest.files, manifest.samples, manifest.checksums, every_byte=True)
    corpus = _open_corpus(path, manifest)
    if file_hash(corpus.path)[:16] != manifest.corpus_hash:
        raise DataError(f"{corpus.path}: not the corpus of {path}, though of its size; index it again")
    return manifest


def index_kind(kind: str) -> type[Any]:
    """Return the class of a kind of index; ConfigError for one that is unknown."""
    if kind not in INDEX_KINDS:
        raise ConfigError(f"index kind {kind!r}: must be one of {', '.join(INDEX_KINDS)}")
    module, _, name = INDEX_KINDS[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of the index in the folder `path`; raises as `open_index` does."""
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; `sleuth index` builds an index")
    if not (path / MANIFEST).is_file():
        raise ConfigError(f"{path}: no index: {MANIFEST} is missing (build interrupted?)")
    try:
        fields = read_json(path / MANIFEST)
        version = fields["format_version"]
        if version > FORMAT_VERSION:
            raise DataError(f"{path}: index format {version} is newer than this program's {FORMAT_VERSION}")
        manifest = Manifest(**fields)
    except SleuthError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path / MANIFEST}: not the manifest of an index ({error})") from error
    if manifest.kind not in INDEX_KINDS:
        allowed = ", ".join(INDEX_KINDS)
        raise DataError(f"{path}: index kind {manifest.kind!r} is unknown; known: {allowed}")
    name = generation_name(manifest.kind, manifest.settings, manifest.corpus_hash)
    if manifest.generation != name or manifest.checksum not in ("", manifest.own_hash):
        raise DataError(f"{path / MANIFEST}: changed since it was written; build the index again")
    return manifest


@contextmanager
def building(out: Path, part: str = "") -> Iterator[None]:
    """Hold the place `out` of an index against all other builders.

    part: hold it against builders of the same part (such as "1-of-4") and of the whole index only.
    Raises ConfigError naming who holds it.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    what = f"{out}: an index is being built there"
    with ExitStack() as held:
        held.enter_context(locked(out.with_name(f".{out.name}.lock"), what, shared=bool(part)))
        if part:
            held.enter_context(locked(out.with_name(f".{out.name}.{part}.lock"), what))
        yield


def write_generation(
    out: Path,
    kind: str,
    settings: dict[str, Any],
    corpus: Corpus,
    write: Callable[[Path], None],
    overwrite: bool = False,
    spec: EncodingSpec | None = None,
    dtype: str = "",
) -> Manifest:
    """Build the index that `write` puts into a folder, and move it to `out` when it is whole.

    The caller holds `out` (see `building`).
    spec, dtype: of the vectors, if an encoder makes them; `settings` must then hold them too.

    An index of the same generation at `out` is kept as it is; another one is replaced only if
    `overwrite`. Raises ConfigError if something else is there, StorageError if writing fails.
    """
    out = out.absolute()
    generation = generation_name(kind, settings, corpus.content_hash)
    if (found := found_at(out, generation, overwrite)) is not None:
        return found
    try:
        with new_folder(out, mark=MANIFEST) as folder:
            write(folder)
            corpus.save_offsets(folder)
            save_columns(corpus, folder / METADATA)
            manifest = _describe(folder, out, kind, settings, corpus, generation, spec, dtype)
            write_json(folder / MANIFEST, asdict(manifest))
    except OSError as error:
        raise StorageError(f"{out}: the index could not be written ({error})") from error
    return manifest


def generation_name(kind: str, settings: dict[str, Any], corpus_hash: str) -> str:
    """Short name of what answers: same kind, settings and corpus, same name, everywhere."""
    made_of = json.dumps([FORMAT_VERSION, kind, settings, corpus_hash], sort_keys=True)
    return f"{kind}-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"


def corpus_of(path: str | Path) -> Corpus:
    """Return the corpus of the index in the folder `path`, unchanged; its encoder stays unloaded."""
    return _open_corpus(Path(path), read_manifest(Path(path)))


def _open_corpus(path: Path, manifest: Manifest) -> Corpus:
    candidates = [path / manifest.corpus_relative_path, Path(manifest.corpus_path)]
    corpus_path = next((p for p in candidates if p.is_file()), None)
    if corpus_path is None:
        raise DataError(f"{path}: its corpus {manifest.corpus_path} is missing")
    size = corpus_path.stat().st_size
    if size != manifest.corpus_bytes:
        was = f"{manifest.corpus_bytes} bytes, now {size}"
        raise DataError(f"{corpus_path}: changed since {path} was built ({was}); index it again")
    corpus = Corpus(corpus_path, index=path)
    if corpus.content_hash != manifest.corpus_hash:
        was = f"hash {manifest.corpus_hash[:12]}, now {corpus.content_hash[:12]}"
        raise DataError(f"{corpus_path}: changed since {path} was built ({was}); index it again")
    return corpus


def found_at(out: Path, generation: str, overwrite: bool) -> Manifest | None:
    """Return the manifest at `out` if it is this generation; None if a new one may go there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        raise ConfigError(f"{out}: exists and is no index; give another --out")
    try:
        found = read_manifest(out)
    except DataError:
        if not overwrite:
            raise
        return None
    if found.generation == generation and not overwrite:
        return found
    if not overwrite:
        raise ConfigError(
            f"{out}: holds the index {found.generation}, asked for {generation}; "
            "give another --out, or --overwrite true"
        )
    return None


def _describe(
    folder: Path, out: Path, kind: str, settings: dict, corpus: Corpus, generation: str,
    spec: EncodingSpec | None, dtype: str,
) -> Manifest:  # fmt: skip
    corpus_path = Path(corpus.path).absolute()
    files = sorted(folder.iterdir())
    manifest = Manifest(
        kind=kind,
        settings=settings,
        corpus_path=str(corpus_path),
        corpus_relative_path=os.path.relpath(corpus_path, out),
        corpus_hash=corpus.content_hash,
        corpus_bytes=corpus_path.stat().st_size,
        corpus_count=len(corpus),
        generation=generation,
        files={p.name: p.stat().st_size for p in files},
        samples={p.name: sample_hash(p) for p in files},
        checksums={p.name: file_hash(p) for p in files},
        spec=asdict(spec) if spec else {},
        spec_hash=spec.hash if spec else "",
        dtype=dtype,
        dimension=spec.dimension if spec else 0,
    )
    return replace(manifest, checksum=manifest.own_hash)
