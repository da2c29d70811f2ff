"""The corpus of an index, opened where it has not changed since."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.corpus import Corpus, JoinedCorpus
from data.errors import DataError
from retriever_server.indexes.manifest import Manifest, part_manifests, read_manifest


def corpus_of(path: str | Path) -> Corpus:
    """Return the passages of a file, or of the index in a folder, unchanged; its encoder stays unloaded."""
    return open_corpus(Path(path), read_manifest(Path(path))) if Path(path).is_dir() else Corpus(path)


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
