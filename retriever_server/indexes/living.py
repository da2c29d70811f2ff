"""Changes of an index on disk: passages are added and deleted without building it again.

    manifest.json        joins the parts: written last, in one step, so that each change is one generation
    terms.npy ...        the files of the index as it was built: part "."
    part-0001/           an index of added passages, as `sleuth index` builds one; never changed
    part-0001.jsonl      these passages
    deleted-0002.npy     rows that no search finds: places among the passages of all parts

What is not in the manifest is there for nobody, and goes with the next change. `compact` merges parts into
one without what was deleted; nothing is encoded again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import Corpus, JoinedCorpus
from data.errors import ConfigError, DataError
from data.formats.rows import passage_row
from data.jsonl import write_json, write_jsonl
from data.records import Passage
from retriever_server.encoders.spec import Encoder, EncodingSpec, Role, Vectors
from retriever_server.indexes.checksums import file_hash, sample_hash, save_array
from retriever_server.indexes.generation import building, write_generation
from retriever_server.indexes.manifest import (
    MANIFEST,
    Manifest,
    built_spec,
    check_same,
    generation_name,
    index_kind,
    part_manifests,
    read_manifest,
)
from retriever_server.indexes.open_corpus import open_corpus
from retriever_server.retriever import Input

MOST_PARTS = 8
"""Parts beyond which a server merges them in the background."""
PATIENCE_SECONDS = 30.0
"""Time that a change waits for another one that is under way."""
_MOST_DELETED = 0.2


def add(
    path: Path,
    passages: Iterable[Passage],
    encoder: Encoder | None = None,
    replaces: bool = False,
    **how: Any,
) -> Manifest:
    """Add passages to the index in the folder `path`; only these are encoded.

    encoder: the one that built the index, if one did. replaces: a passage takes the place of the one
    with its id. how: `progress` of the encoding. Raises DataError for an id that is there already, or another
    encoder, and as `open_index`.
    """
    with _alone(path):
        manifest, corpus = _read(path)
        if (encoder is None) == bool(manifest.spec):
            takes = "needs its" if manifest.spec else "takes no"
            raise DataError(f"{path}: an index of kind {manifest.kind} {takes} encoder")
        if encoder:
            check_same(path, manifest, encoder)
        name = _next(path, manifest)
        new = (passage_row(each, path) for each in _each_once(passages, path))
        write_jsonl(file := path / f"{name}.jsonl", new)
        added = Corpus(file)
        known = corpus.positions(ids := [each.id for each in added])
        if not replaces and (known >= 0).any():
            there = ids[int(np.argmax(known >= 0))]
            raise DataError(f"{path}: has a passage {there!r} already; with replace the new one stays")
        _write_part(path, name, manifest, added, encoder, **how)
        left = _rows(corpus, np.delete(np.arange(len(corpus)), known[known >= 0]))
        kept = np.concatenate([left, sum(map(len, corpus.parts)) + np.arange(len(added))])
        return _commit(path, manifest, [*corpus.parts, added], [*_names(manifest), name], kept)


def _each_once(passages: Iterable[Passage], path: Path) -> Iterator[Passage]:
    """Yield new passages. Raises DataError for none, and for an id that two of them have."""
    seen: set[str] = set()
    for passage in passages:
        if passage.id in seen:
            raise DataError(f"{path}: two of the new passages have the id {passage.id!r}; nothing was added")
        seen.add(passage.id)
        yield passage
    if not seen:
        raise DataError(f"{path}: no passages to add")


def delete(path: Path, ids: Sequence[str]) -> Manifest:
    """Delete passages from the index in the folder `path`. Raises DataError naming an id that is unknown."""
    with _alone(path):
        manifest, corpus = _read(path)
        known = corpus.positions(ids)
        if (known < 0).any():
            unknown = ids[int(np.argmax(known < 0))][:80]
            raise DataError(f"{path}: has no passage {unknown!r}; nothing was deleted")
        left = np.delete(np.arange(len(corpus)), known)
        if not len(left):
            raise DataError(
                f"{path}: these are all of its {len(corpus)} passages; an index needs one at least"
            )
        return _commit(path, manifest, corpus.parts, _names(manifest), _rows(corpus, left))


def compact(path: Path, first: int = 0) -> Manifest:
    """Merge the parts of the index in the folder `path`, from the `first` on, into one."""
    with _alone(path):
        manifest, corpus = _read(path)
        names = _names(manifest)
        if not manifest.parts or first >= len(names):  # another one merged them meanwhile
            return manifest
        merged = _joined(corpus, first)
        if len(merged.parts) == 1 and merged.rows is None:
            return manifest
        before = sum(map(len, corpus.parts[:first]))
        rows = _rows(corpus, np.arange(len(corpus)))
        kept, left = rows[rows < before], (corpus.parts[:first], names[:first])
        if not len(merged):
            return _commit(path, manifest, *left, kept)
        name, part = _write_merged(path, manifest, first, merged)
        kept = np.concatenate([kept, before + np.arange(len(part))])
        return _commit(path, manifest, [*left[0], part], [*left[1], name], kept)


def due(corpus: Corpus) -> int | None:
    """Return the first of the parts of an index that should be merged; None for none.

    All where a fifth of the passages is deleted; where there are many parts, the last ones, as far back as
    one is not many times as large as all after it: a passage is copied a few times at most.
    """
    sizes = [len(part) for part in corpus.parts]
    if len(corpus) < (1 - _MOST_DELETED) * sum(sizes):
        return 0
    if len(sizes) <= MOST_PARTS:
        return None
    return next(i for i in range(len(sizes)) if sizes[i] <= 4 * sum(sizes[i + 1 :]) or i == len(sizes) - 2)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the index against others that write it; one that does so now is waited for. Raises ConfigError."""
    read_manifest(path)  # where there is no index nothing is locked
    with ExitStack() as held:
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                held.enter_context(building(path))
                break
            except ConfigError:
                if time.monotonic() > end:
                    raise
            time.sleep(0.05)
        yield


class _Unloaded(Encoder):
    """The encoder of an index whose vectors are only copied."""

    def __init__(self, spec: EncodingSpec) -> None:
        self.spec = spec

    def encode(self, inputs: Sequence[Input], role: Role) -> Vectors:
        """Encode nothing: it is never asked to."""
        raise NotImplementedError


def _read(path: Path) -> tuple[Manifest, Corpus]:
    manifest = read_manifest(path)
    corpus = open_corpus(path, manifest)
    _own_files(path, manifest, corpus)
    return manifest, corpus


def _own_files(path: Path, manifest: Manifest, corpus: Corpus) -> list[str]:
    """Return the files of the index as it was built, with what changes need beside them."""
    if "." not in _names(manifest):
        return []
    more = index_kind(manifest.kind).prepare(path, corpus.parts[0], manifest.settings)
    return [name for name in dict.fromkeys([*manifest.files, *more]) if name != manifest.deleted]


def _names(manifest: Manifest) -> list[str]:
    return list(manifest.parts or (".",))


def _next(path: Path, manifest: Manifest) -> str:
    """Return a name for a new part, with nothing there that a killed change has left."""
    taken = [int(name.partition("-")[2]) for name in manifest.parts if name != "."]
    name = f"part-{max(taken, default=0) + 1:04d}"
    shutil.rmtree(path / name, ignore_errors=True)
    return name


def _rows(corpus: Corpus, positions: np.ndarray) -> np.ndarray:
    return positions if corpus.rows is None else corpus.rows[positions]


def _joined(corpus: Corpus, first: int) -> JoinedCorpus:
    parts, start = corpus.parts[first:], sum(map(len, corpus.parts[:first]))
    alive = corpus.alive[start:] if isinstance(corpus, JoinedCorpus) else np.ones(len(corpus), bool)
    return JoinedCorpus(parts, np.flatnonzero(~alive))


def _write_part(
    path: Path, name: str, manifest: Manifest, added: Corpus, encoder: Encoder | None, **how: Any
) -> None:
    kind = index_kind(manifest.kind)
    of = replace(manifest, kind=kind.part_kind, settings=kind.part_settings(manifest.settings))

    def write(folder: Path) -> None:
        index_kind(of.kind).write_part(folder, added, of.settings, encoder=encoder, place=path / name, **how)

    _generation(path / name, of, added, write)


def _write_merged(path: Path, manifest: Manifest, first: int, merged: JoinedCorpus) -> tuple[str, Corpus]:
    """Build one index of all parts from the `first` on; return its name and corpus."""
    name, (_, of) = _next(path, manifest), part_manifests(path, manifest)[first]
    write_jsonl(file := path / f"{name}.jsonl", (passage_row(each, path) for each in merged))
    of_parts = replace(of, parts={part: manifest.parts[part] for part in _names(manifest)[first:]})
    encoder = [_Unloaded(built_spec(path, manifest))] if of.spec else []
    index = index_kind(of.kind)(path, of_parts, merged, *encoder)
    _generation(path / name, of, part := Corpus(file), index.write_merged)
    return name, part


def _generation(place: Path, of: Manifest, corpus: Corpus, write: Callable[[Path], None]) -> None:
    spec = built_spec(place, of) if of.spec else None
    write_generation(place, of.kind, of.settings, corpus, write, True, spec, of.dtype)


def _commit(
    path: Path, manifest: Manifest, parts: Sequence[Corpus], names: Sequence[str], kept: np.ndarray
) -> Manifest:
    """Write the manifest of these parts, with the rows `kept`, and remove what it does not name."""
    gone = np.ones(sum(map(len, parts)), bool)
    gone[kept] = False
    corpus, deleted = JoinedCorpus(parts, np.flatnonzero(gone)), ""
    own = _own_files(path, manifest, corpus) if "." in names else []
    if gone.any():
        taken = (f"deleted-{number:04d}.npy" for number in count(1))
        deleted = next(name for name in taken if name != manifest.deleted)
        save_array(path / deleted, np.flatnonzero(gone))
    files = [name for name in (*own, deleted) if name]
    known = {name: manifest.checksums[name] for name in own if name in manifest.checksums}
    new = replace(
        manifest,
        parts={name: part.content_hash for name, part in zip(names, parts, strict=True)},
        deleted=deleted,
        corpus_hash=corpus.content_hash,
        corpus_count=len(corpus),
        generation=generation_name(manifest.kind, manifest.settings, corpus.content_hash),
        files={name: (path / name).stat().st_size for name in files},
        samples={name: sample_hash(path / name) for name in files},
        checksums={name: known.get(name) or file_hash(path / name) for name in files},
    )
    new = replace(new, checksum=new.own_hash)
    write_json(path / MANIFEST, new.as_record())
    _remove_others(path, manifest, new)
    return new


def _remove_others(path: Path, old: Manifest, new: Manifest) -> None:
    """Remove files and parts that the new manifest does not name any more, or never did."""
    named = {*new.files, *new.parts, *(f"{name}.jsonl" for name in new.parts)}
    left = {
        *(path / name for name in old.files),
        *path.glob("part-*"),
        *path.glob("deleted-*"),
        *path.glob(".part-*"),
        *path.glob(".deleted-*"),
        *path.glob(f".{MANIFEST}.*"),
    }
    for each in left:
        if each.name not in named:
            with suppress(OSError):
                shutil.rmtree(each) if each.is_dir() else each.unlink()
