"""Writing an index: a generation is a folder that appears whole, its manifest written last.

A folder without a manifest is no index: an interrupted build leaves nothing that opens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.atomic import new_folder
from data.columns import METADATA, save_columns
from data.errors import ConfigError, DataError, StorageError
from data.jsonl import write_json
from data.machine.lock import locked
from retriever_server.indexes.checksums import file_hash, sample_hash
from retriever_server.indexes.manifest import MANIFEST, Manifest, generation_name, read_manifest

if TYPE_CHECKING:
    from data.corpus import Corpus
    from retriever_server.encoders.spec import EncodingSpec


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
            corpus_path, files = Path(corpus.path).absolute(), sorted(folder.iterdir())
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
            manifest = replace(manifest, checksum=manifest.own_hash)
            write_json(folder / MANIFEST, manifest.as_record())
    except OSError as error:
        raise StorageError(f"{out}: the index could not be written ({error})") from error
    return manifest


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
