"""The table of a corpus: where each passage starts, and hashes of its line and of its id.

It takes 32 bytes a passage and lies sealed in the folder of an index or in the user's cache, never beside the
user's own file.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data.errors import StorageError

logger = logging.getLogger(__name__)

OFFSETS = "corpus.offsets"
"""Its name in the folder of an index."""
_MAGIC = 0x534C45555448_0002  # "SLEUTH", layout 2; the first had neither hashes of lines nor a seal
_HEADER = 6  # magic, size and modification time of the corpus, content hash, passages, those with metadata
_WORTH_CACHING_BYTES = 1 << 20  # a smaller corpus is read anew in no time

Stamp = tuple[int, int]
"""Size and modification time (ns) of a file."""


@dataclass(frozen=True)
class Offsets:
    """The table of P passages, one array of uint64: header and columns."""

    table: np.ndarray

    @staticmethod
    def of(
        stamp: Stamp,
        sha256: bytes,
        with_metadata: int,
        starts: np.ndarray,
        lines: np.ndarray,
        ids: np.ndarray,
    ) -> Offsets:
        """starts (P + 1,), lines and ids (P,): hashes, in the order of the passages."""
        order = np.argsort(ids, kind="stable")
        header = [_MAGIC, *stamp, int.from_bytes(sha256[:8]), len(ids), with_metadata]
        columns = (np.array(header, np.uint64), starts, lines, ids[order], order.astype(np.uint64))
        return Offsets(np.concatenate(columns))

    @staticmethod
    def load(path: Path) -> Offsets | None:
        """The table in a file; None where there is none, or it is damaged or of another layout."""
        from data.atomic import read_sealed

        content = read_sealed(path)
        if content is None or len(content) % 8 or len(content) < 8 * _HEADER:
            return None
        table = np.frombuffer(content, np.uint64)
        same = int(table[0]) == _MAGIC and len(table) == _HEADER + 4 * int(table[4]) + 1
        return Offsets(table) if same else None

    def save(self, path: Path) -> None:
        """Write the file; raises StorageError."""
        from data.atomic import write_sealed

        with write_sealed(path) as file:
            file.write(self.table.data)

    @property
    def stamp(self) -> Stamp:
        """Size and time of the corpus when it was read."""
        return int(self.table[1]), int(self.table[2])

    @property
    def content_hash(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the corpus."""
        return f"{int(self.table[3]):016x}"

    @property
    def count(self) -> int:
        """Number of passages, P."""
        return int(self.table[4])

    @property
    def with_metadata(self) -> int:
        """Passages that have metadata."""
        return int(self.table[5])

    @property
    def is_slow(self) -> bool:
        """Return whether reading the corpus again takes so long that the table belongs into the cache."""
        return self.stamp[0] >= _WORTH_CACHING_BYTES

    @cached_property
    def columns(self) -> list[np.ndarray]:
        """starts (P + 1,), hashes of lines (P,), sorted hashes of ids (P,), position of each of these (P,)"""
        count = self.count
        return np.split(self.table[_HEADER:], [count + 1, 2 * count + 1, 3 * count + 1])


def cached_file(name: str) -> Path | None:
    """Return the path of a file about a corpus in the user's cache; None for a user without a home."""
    try:
        return Path.home() / ".cache" / "sleuth" / "corpora" / name
    except RuntimeError:
        return None


def load_kept(path: Path, stamp: Stamp, index: str | Path | None) -> Offsets | None:
    """The table of the corpus `path` of this stamp that an earlier opening kept, or an index; else None.

    That of the index also for a copy of its corpus, which has another time.
    """
    if index is not None and (found := Offsets.load(Path(index) / OFFSETS)) is not None:
        copied = stamp[0] == found.stamp[0] and stamp != found.stamp  # or touched
        if found.stamp == stamp or (copied and hash_file(path) == found.content_hash):
            return found
    place = _place(path)
    found = Offsets.load(place) if place else None
    return found if found is not None and found.stamp == stamp else None


def hash_file(path: Path) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a file, as `Corpus.content_hash`."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _place(path: Path) -> Path | None:
    """Return the path of the table of a corpus in the user's cache."""
    whose = hashlib.sha256(str(path.resolve()).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return cached_file(f"{whose}.{path.name}.offsets")


def keep(path: Path, offsets: Offsets) -> None:
    """Save the table of the corpus `path` for the next opening, where that is worth it and can be done."""
    place = _place(path)
    if place is None or not offsets.is_slow:
        return
    try:
        offsets.save(place)
    except StorageError as error:
        logger.warning("%s: its offsets stay in memory: %s", path, error)
