"""Encode a corpus to vectors on disk, a shard of passages at a time, so that a killed run goes on.

A shard is some .npy files and a marker, `00003.done`, written last. A folder of shards is named for all that
decides them. Several machines may each write some of the shards of one folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from data.corpus import Corpus
from data.errors import DataError, StorageError, require
from data.jsonl import read_json, write_json
from data.pages.modalities import read
from data.records import Item
from retriever_server.encoders.spec import Encoder, Multi, Vectors, concatenate, no_vectors, take
from retriever_server.indexes.checksums import save_array

logger = logging.getLogger(__name__)

DTYPES = {"float32": np.float32, "float16": np.float16, "int8": np.int8}
_TEXTS_TOGETHER, _IMAGES_TOGETHER = 2048, 256
ON_ERROR = ("stop", "skip")
Progress = Callable[[Iterable[int], int], Iterable[int]]
"""Wraps the positions of the passages as they are encoded, and is told how many there are."""


def silent(positions: Iterable[int], total: int) -> Iterable[int]:
    """No progress bar."""
    return positions


@dataclass(frozen=True)
class Shards:
    """The vectors of a corpus in `folder`, whole or on the way."""

    folder: Path
    corpus: Corpus
    encoder: Encoder
    dtype: str
    passages_per_shard: int
    on_error: str = "stop"
    """Stop at a passage whose image cannot be read, or skip it: no search finds it then."""

    @staticmethod
    def beside(
        out: Path,
        corpus: Corpus,
        encoder: Encoder,
        dtype: str,
        passages_per_shard: int,
        on_error: str = "stop",
    ) -> Shards:
        """Return the shards of an index at `out`; their folder lies beside and bears their identity."""
        require(on_error in ON_ERROR, "on_error", on_error, f"one of {', '.join(ON_ERROR)}")
        require(dtype in DTYPES, "dtype", dtype, f"one of {', '.join(DTYPES)}")
        require(passages_per_shard >= 1, "passages_per_shard", passages_per_shard, ">= 1")
        made_of = [encoder.spec.hash, corpus.content_hash, dtype, passages_per_shard]
        made_of += [on_error] if on_error != "stop" else []
        identity = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
        folder = out.absolute().with_name(f".{out.name}.encoding-{identity}")
        return Shards(folder, corpus, encoder, dtype, passages_per_shard, on_error)

    def __len__(self) -> int:
        return -(-len(self.corpus) // self.passages_per_shard)

    def positions(self, shard: int) -> range:
        """Return the passages of a shard."""
        start = shard * self.passages_per_shard
        return range(start, min(start + self.passages_per_shard, len(self.corpus)))

    def missing(self, part: tuple[int, int] = (1, 1)) -> list[int]:
        """Return the shards that are not done, of part i of n: every n-th, from the i-th on."""
        return [shard for shard in range(part[0] - 1, len(self), part[1]) if not self._done(shard)]

    def encode(self, progress: Progress = silent, part: tuple[int, int] = (1, 1)) -> None:
        """Write the missing shards of part i of n. Raises StorageError, DataError for a broken vector."""
        todo = self.missing(part)
        if 0 < len(todo) < len(range(part[0] - 1, len(self), part[1])):
            logger.info("%s: going on, %d shards of %d missing", self.folder, len(todo), len(self))
        all_positions = [position for shard in todo for position in self.positions(shard)]
        positions = iter(progress(all_positions, len(all_positions)))
        for shard in todo:
            self._write(shard, islice(positions, len(self.positions(shard))))
        next(positions, None)  # the progress bar ends

    def check_some(self) -> None:
        """DataError if every passage of the corpus was skipped; all shards must be there."""
        skipped = sum(len(np.load(file)) for file in self.folder.glob("*.skipped.npy"))
        if skipped and skipped == len(self.corpus):
            raise DataError(f"{self.corpus.path}: none of its {skipped} passages can be encoded")

    def load(self, shard: int, name: str) -> np.ndarray:
        """Return an array of a shard, mapped."""
        return np.load(self._file(shard, name), mmap_mode="r").view(np.ndarray)

    def link_into(self, folder: Path, arrays: str = "*.npy") -> None:
        """Put arrays into another folder too: they stay here until the index is whole."""
        for path in sorted(self.folder.glob(arrays)):
            try:
                os.link(path, folder / path.name)
            except OSError:  # a file system without links
                shutil.copyfile(path, folder / path.name)

    def _write(self, shard: int, positions: Iterator[int]) -> None:
        packed, skipped = [], []
        together = _TEXTS_TOGETHER if self.encoder.spec.inputs == "text" else _IMAGES_TOGETHER
        while block := list(islice(positions, together)):
            vectors, broken = self._encoded(block)
            packed.append(pack(vectors, self.dtype))
            skipped += broken
        arrays = {name: np.concatenate([each[name] for each in packed]) for name in packed[0]}
        if skipped:
            arrays["skipped"] = np.array(skipped, np.int64)
        self.save(shard, arrays)

    def save(self, shard: int, arrays: dict[str, np.ndarray]) -> None:
        """Write the arrays of a shard. Raises StorageError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sizes = {}
            for name, array in arrays.items():
                path = self._file(shard, name)
                save_array(path, array)
                sizes[path.name] = path.stat().st_size
            write_json(self.folder / f"{shard:05d}.done", sizes)
        except OSError as error:
            raise StorageError(f"{self.folder}: vectors could not be written ({error})") from error

    def _encoded(self, block: list[int]) -> tuple[Vectors, list[int]]:
        """Encode a block of passages; also says which are skipped and have no vectors, or zeros."""
        spec = self.encoder.spec
        try:
            inputs = [spec.render(self.corpus[position]) for position in block]
            return self._checked(self.encoder.encode(inputs, "passage"), block), []
        except DataError as error:
            broken = self._broken(block)
            if not broken:
                raise
            if self.on_error == "stop":
                raise DataError(f"{next(iter(broken.values()))} (--on_error skip leaves it out)") from error
        for what in broken.values():
            logger.warning("skipped: %s", what)
        kept = [position for position in block if position not in broken]
        blank = no_vectors(spec.kind, spec.dimension, 1)
        if kept:
            inputs = [spec.render(self.corpus[position]) for position in kept]
            blank = concatenate([self._checked(self.encoder.encode(inputs, "passage"), kept), blank])
        places = {position: i for i, position in enumerate(kept)}
        return take(blank, np.array([places.get(each, len(kept)) for each in block])), list(broken)

    def _broken(self, block: list[int]) -> dict[int, str]:
        """Position -> what is wrong, of the passages whose image is missing or cannot be read."""
        found = {}
        for position in block:
            passage = self.corpus[position]
            try:
                if isinstance(item := self.encoder.spec.render(passage), Item):
                    read(item)
            except DataError as error:
                named = f"passage {passage.id!r}"
                found[position] = str(error) if str(error).startswith(named) else f"{named}: {error}"
        return found

    def _checked(self, vectors: Vectors, positions: list[int]) -> Vectors:
        model = self.encoder.spec.model
        count = len(vectors) if isinstance(vectors, Multi) else vectors.shape[0]
        if count != len(positions):
            raise DataError(f"{model}: gave vectors of {count} texts for {len(positions)}")
        values = vectors.values if isinstance(vectors, Multi) else vectors
        values = values if isinstance(values, np.ndarray) else values.data
        if not np.isfinite(values).all():
            first, last = self.corpus[positions[0]].id, self.corpus[positions[-1]].id
            raise DataError(f"{model}: NaN or infinite in the vectors of passages {first!r} to {last!r}")
        return vectors

    def _done(self, shard: int) -> bool:
        try:
            sizes = read_json(self.folder / f"{shard:05d}.done")
            return all((self.folder / name).stat().st_size == size for name, size in sizes.items())
        except (OSError, DataError):
            return False

    def _file(self, shard: int, name: str) -> Path:
        return self.folder / f"{shard:05d}.{name}.npy"


def pack(vectors: Vectors, dtype: str) -> dict[str, np.ndarray]:
    """Return the arrays of stored vectors: vectors (and scales), lengths of multi, columns of sparse."""
    if isinstance(vectors, np.ndarray):
        return quantise(vectors, dtype)
    if isinstance(vectors, Multi):
        return {**quantise(vectors.values, dtype), "lengths": np.diff(vectors.offsets).astype(np.int32)}
    vectors.sort_indices()
    return {
        "weights": vectors.data.astype(np.float32),
        "terms": vectors.indices.astype(np.int32),
        "lengths": np.diff(vectors.indptr).astype(np.int32),
    }


def quantise(vectors: np.ndarray, dtype: str, name: str = "vectors") -> dict[str, np.ndarray]:
    """Vectors as stored. int8 is symmetric with a scale a vector: v ~ scale * q, scale = max |v| / 127.

    (N, D) -> `name` (N, D), and for int8 `name`-scales (N,) float32. Its error is at most scale / 2 a number.
    """
    if dtype != "int8":
        return {name: vectors.astype(DTYPES[dtype])}
    scales = np.abs(vectors).max(axis=1).astype(np.float32) / np.float32(127)
    quantised = np.rint(vectors / np.where(scales == 0, 1, scales)[:, None]).astype(np.int8)
    return {name: quantised, f"{name}-scales": scales}
