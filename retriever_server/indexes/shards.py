"""From a corpus to vectors on disk, a shard of passages at a time, so that a killed run goes on.

A shard is some .npy files and a marker, `00003.done`, written last. A folder of shards is named for
everything that decides them: encoder, corpus, dtype and size of a shard. Several machines may each
write some of the shards of one folder.
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
from data.errors import ConfigError, DataError, StorageError
from data.jsonl import read_json, write_json
from retriever_server.encoders.spec import Encoder
from retriever_server.encoders.vectors import Multi, Vectors
from retriever_server.indexes.integrity import save_array

logger = logging.getLogger(__name__)

DTYPES = {"float32": np.float32, "float16": np.float16, "int8": np.int8}
_ENCODED_TOGETHER = 2048
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

    @staticmethod
    def beside(out: Path, corpus: Corpus, encoder: Encoder, dtype: str, passages_per_shard: int) -> Shards:
        """Those that an index at `out` is made of; its folder lies beside and bears their identity."""
        if dtype not in DTYPES:
            raise ConfigError(f"dtype = {dtype}: must be one of {', '.join(DTYPES)}")
        if passages_per_shard < 1:
            raise ConfigError(f"passages_per_shard = {passages_per_shard}: must be >= 1")
        made_of = json.dumps([encoder.spec.hash, corpus.content_hash, dtype, passages_per_shard])
        identity = hashlib.sha256(made_of.encode()).hexdigest()[:12]
        folder = out.absolute().with_name(f".{out.name}.encoding-{identity}")
        return Shards(folder, corpus, encoder, dtype, passages_per_shard)

    def __len__(self) -> int:
        return -(-len(self.corpus) // self.passages_per_shard)

    def positions(self, shard: int) -> range:
        """The passages of a shard."""
        start = shard * self.passages_per_shard
        return range(start, min(start + self.passages_per_shard, len(self.corpus)))

    def missing(self, part: tuple[int, int] = (1, 1)) -> list[int]:
        """The shards that are not done, of part i of n: every n-th, from the i-th on."""
        return [shard for shard in range(part[0] - 1, len(self), part[1]) if not self._done(shard)]

    def encode(self, part: tuple[int, int] = (1, 1), progress: Progress = silent) -> None:
        """Write the missing shards of part i of n. Raises StorageError, DataError for a broken vector."""
        todo = self.missing(part)
        if 0 < len(todo) < len(range(part[0] - 1, len(self), part[1])):
            logger.info("%s: going on, %d shards of %d missing", self.folder, len(todo), len(self))
        all_positions = [position for shard in todo for position in self.positions(shard)]
        positions = iter(progress(all_positions, len(all_positions)))
        for shard in todo:
            self._write(shard, islice(positions, len(self.positions(shard))))
        next(positions, None)  # the progress bar ends

    def load(self, shard: int, name: str) -> np.ndarray:
        """An array of a shard, mapped."""
        return np.load(self._file(shard, name), mmap_mode="r").view(np.ndarray)

    def link_into(self, folder: Path) -> None:
        """Put all arrays into another folder too: they stay here until the index is whole."""
        for path in sorted(self.folder.glob("*.npy")):
            try:
                os.link(path, folder / path.name)
            except OSError:  # a file system without links
                shutil.copyfile(path, folder / path.name)

    def _write(self, shard: int, positions: Iterator[int]) -> None:
        packed = []
        while block := list(islice(positions, _ENCODED_TOGETHER)):
            texts = [self.encoder.spec.render(self.corpus[position]) for position in block]
            packed.append(pack(self._checked(self.encoder.encode(texts, "passage"), block), self.dtype))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sizes = {}
            for name in packed[0]:
                path = self._file(shard, name)
                save_array(path, np.concatenate([arrays[name] for arrays in packed]))
                sizes[path.name] = path.stat().st_size
            write_json(self.folder / f"{shard:05d}.done", sizes)
        except OSError as error:
            raise StorageError(f"{self.folder}: vectors could not be written ({error})") from error

    def _checked(self, vectors: Vectors, positions: list[int]) -> Vectors:
        model = self.encoder.spec.model
        count = len(vectors) if isinstance(vectors, Multi) else vectors.shape[0]
        if count != len(positions):
            raise DataError(f"{model}: vectors of {count} texts, {len(positions)} were given")
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
    """The arrays that vectors are stored as: vectors (and scales), lengths of multi, columns of sparse."""
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
