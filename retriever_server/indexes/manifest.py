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

from data.errors import ConfigError, DataError, SleuthError
from data.jsonl import read_json
from data.records import FORMAT_VERSION
from retriever_server.encoders.spec import Encoder, EncodingSpec

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
    """Parts of an index that was changed: folder -> corpus hash of what it joins ("." is its own)."""
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
        what = "is a file, must be the folder of an index" if path.exists() else "no such folder"
        raise ConfigError(f"{path}: {what}; `sleuth index` builds an index")
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


def built_spec(path: Path, manifest: Manifest) -> EncodingSpec:
    """Return the spec of the encoder that built the index."""
    try:
        spec = EncodingSpec(**manifest.spec)
    except (TypeError, ConfigError) as error:
        raise DataError(f"{path}: its manifest was changed: {error}") from error
    if spec.hash != manifest.spec_hash:
        raise DataError(f"{path}: its manifest was changed: spec {spec.hash}, not {manifest.spec_hash}")
    return spec


def check_same(path: Path, manifest: Manifest, encoder: Encoder) -> None:
    """DataError if the encoder is not the one that built the index."""
    spec = built_spec(path, manifest)
    if encoder.spec.hash != spec.hash:
        raise DataError(f"{path}: built with another encoder ({encoder.spec.differences(spec)})")
