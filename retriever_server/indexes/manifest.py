"""The manifest of an index on disk: its settings, files and corpus, and the parts that a changed one joins.

A generation's name is a hash of what made it: the kind of index, its settings and the contents of its corpus.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import Corpus
from data.errors import ConfigError, DataError, SleuthError
from data.joined_corpus import JoinedCorpus
from data.jsonl import read_json
from data.records import FORMAT_VERSION
from retriever_server.indexes.checksums import check_files, file_hash

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
    parts: dict[str, str] = field(default_factory=dict)
    """Of an index that was changed: folder -> corpus hash of the indexes that it joins ("." is its own)."""
    deleted: str = ""
    """The file of the rows that were deleted, ascending."""

    @property
    def own_hash(self) -> str:
        """The right `checksum`."""
        fields = json.dumps(self.as_record() | {"checksum": ""}, sort_keys=True)
        return hashlib.sha256(fields.encode()).hexdigest()[:16]

    def as_record(self) -> dict[str, Any]:
        """Return its JSON; what only a changed index has is left out of others."""
        changed = {"parts": self.parts, "deleted": self.deleted}
        return {name: value for name, value in asdict(self).items() if changed.get(name, True)}

    def folders(self, path: Path) -> list[Path]:
        """Return the folders of the indexes that the one at `path` joins: itself, if it was not changed."""
        return [path / name for name in self.parts or (".",)]


def check_parts(path: Path, manifest: Manifest, every_byte: bool) -> None:
    """Check the files of an index, and of all that it joins, as `check_files`."""
    others = [each for each in part_manifests(path, manifest) if each[0] != path]
    for folder, part in [(path, manifest), *others]:
        check_files(folder, part.files, part.samples, part.checksums, every_byte)


def verify_index(path: str | Path) -> Manifest:
    """Read every byte of the index and its corpus; raises DataError naming the first file that differs."""
    path = Path(path)
    manifest = read_manifest(path)
    if manifest.files and not manifest.checksums:
        raise DataError(f"{path}: was built without checksums; build it again")
    check_parts(path, manifest, every_byte=True)
    whole = open_corpus(path, manifest)
    for corpus in whole.parts:
        if file_hash(corpus.path)[:16] != corpus.content_hash:
            raise DataError(f"{corpus.path}: not the corpus of {path}, though of its size; index it again")
    return manifest


def part_manifests(path: Path, manifest: Manifest) -> list[tuple[Path, Manifest]]:
    """Return folder and manifest of each index that the one at `path` joins."""
    parts = []
    for name, corpus_hash in manifest.parts.items():
        part = manifest if name == "." else read_manifest(path / name)
        if name != "." and part.corpus_hash != corpus_hash:
            raise DataError(f"{path / name}: not the index that {path} joins; build the index again")
        parts.append((path / name, replace(part, corpus_hash=corpus_hash, parts={}, deleted="")))
    return parts


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


def generation_name(kind: str, settings: dict[str, Any], corpus_hash: str) -> str:
    """Short name of what answers: same kind, settings and corpus, same name, everywhere."""
    made_of = json.dumps([FORMAT_VERSION, kind, settings, corpus_hash], sort_keys=True)
    return f"{kind}-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"


def corpus_of(path: str | Path) -> Corpus:
    """Return the corpus of the index in the folder `path`, unchanged; its encoder stays unloaded."""
    return open_corpus(Path(path), read_manifest(Path(path)))


def open_corpus(path: Path, manifest: Manifest) -> Corpus:
    """Return the corpus of an index, unchanged. Raises DataError."""
    if manifest.parts:
        deleted = np.load(path / manifest.deleted) if manifest.deleted else np.zeros(0, np.int64)
        parts = [open_corpus(*each) for each in part_manifests(path, manifest)]
        return JoinedCorpus(parts, deleted)
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
