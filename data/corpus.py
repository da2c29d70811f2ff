"""A corpus on disk: its passages by position or by id, read one by one, never all in memory.

The first, checking pass over the file makes a table of offsets and hashes (`data.offsets`), which is used
while size and time of the file stay the same. Every passage read is compared with its hash: where the file
was rewritten since, or damaged, that is an error and never another text.
"""

from __future__ import annotations

import hashlib
import logging
import operator
import os
import weakref
from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from data.errors import CorpusChanged, DataError, unreadable
from data.formats.rows import parse_passage
from data.jsonl import check_is_file, parse_line
from data.offsets import OFFSETS, Offsets, Stamp, keep, load_kept
from data.records import Passage
from data.text import counted

logger = logging.getLogger(__name__)

_SLOW_BYTES = 1 << 26  # about a second
MOST_PARTS = 1000
"""Passages of one document that are put together."""


class Corpus:
    """The passages of a JSON lines file; `corpus[i]` is that on its i-th line that is not blank.

    A line is {"id", "contents"} as in Search-R1 (title on the first line, in double quotes, then
    the text), {"id", "title", "text"}, or a mixture; "metadata", an object, may stand beside them, and
    "image", a file (or a page of one, "report.pdf#page=3") whose path starts at the corpus's folder; a file
    of another registered modality (`data.pages.modalities`) likewise, under its name.
    Reading is safe from many threads.
    """

    rows: np.ndarray | None = None
    """Place of each passage among all lines of its files, where some were deleted. (P,), ascending"""

    def __init__(self, path: str | Path, index: str | Path | None = None) -> None:
        """Open `path`, not compressed; the first time every line is checked.

        The table goes into the user's cache; where that cannot be written it stays in memory.
        index: the folder of an index that keeps the table (see `save_offsets`).
        Raises DataError "FILE:LINE: what is wrong" for a malformed line, a missing, empty or repeated id.
        Passages without text and image are kept; a warning counts them.
        """
        self.path = Path(path)
        self._folder = self.path.parent.resolve()  # where images are looked for, wherever this process goes
        self._made_from = path, index
        self._file = _open(self.path)
        weakref.finalize(self, os.close, self._file)
        found = load_kept(self.path, _stamp(self._file), index)
        self.offsets = found or _read_all(self.path, self._file)
        if found is None:
            keep(self.path, self.offsets)
        self.content_hash = self.offsets.content_hash
        """First 16 hexadecimal digits of the SHA-256 of the file's bytes."""
        self.index_folder = Path(index) if index is not None else None
        self._starts, self._lines, self._hashes, self._positions = self.offsets.columns

    def save_offsets(self, index: Path) -> None:
        """Put the table into the folder of an index. Raises StorageError."""
        self.offsets.save(index / OFFSETS)

    @property
    def parts(self) -> Sequence[Corpus]:
        """Corpora that it joins (see `JoinedCorpus`), or itself."""
        return (self,)

    def __reduce__(self) -> tuple[Any, ...]:
        return Corpus, self._made_from  # another process opens the file itself

    def __len__(self) -> int:
        return len(self._hashes)

    def __getitem__(self, position: SupportsIndex) -> Passage:
        """The passage at `position`, from 0; IndexError beyond, and for -1, an index's "none".

        Raises CorpusChanged where the file does not hold it any more.
        """
        position = operator.index(position)
        if not 0 <= position < len(self):
            raise IndexError(f"passage {position} of {len(self)} in {self.path}")
        start, end = self._starts[position : position + 2].tolist()
        line = os.pread(self._file, end - start, start)
        if _hash_line(line) != int(self._lines[position]):
            was = f"{self.path.name}: passage {position} is not what was indexed"
            raise CorpusChanged(f"{was}: the file was rewritten or damaged; index it again")
        try:
            passage = _parse(line)
        except ValueError as error:  # checked once, maybe by who knew more modalities
            raise CorpusChanged(f"{self.path.name}: passage {position}: {error}") from error
        return passage.placed(self._folder) if passage.image or passage.media else passage

    def __iter__(self) -> Iterator[Passage]:
        return (self[position] for position in range(len(self)))

    def get(self, passage_id: str) -> Passage | None:
        """The passage with this id, or None."""
        position = self.position_of(passage_id)
        return None if position is None else self[position]

    def position_of(self, passage_id: str) -> int | None:
        """Return the position of this id, or None."""
        wanted = np.uint64(hash_text(passage_id))
        first = int(np.searchsorted(self._hashes, wanted))
        for slot in range(first, len(self)):  # one turn, but for two ids of the same hash
            if self._hashes[slot] != wanted:
                break
            if self[position := int(self._positions[slot])].id == passage_id:
                return position
        return None

    def document(self, passage_id: str) -> Passage | None:
        """Return the whole document of a passage: those beside it with its url, else its title, as one.

        None where there is no such passage.
        """
        if (passage := self.get(passage_id)) is None or not (key := _document_of(passage)):
            return passage
        position, parts = int(self.positions([passage_id])[0]), [passage]
        for step in (-1, 1):
            at = position + step
            while 0 <= at < len(self) and len(parts) < MOST_PARTS and _document_of(self[at]) == key:
                parts.insert(0 if step < 0 else len(parts), self[at])
                at += step
        return Passage(passage_id, "\n".join(part.text for part in parts), passage.title, passage.metadata)

    def positions(self, ids: Sequence[str]) -> np.ndarray:
        """The position of each id, -1 for one that none has. (N,), int64; goes by 64 bits of hash alone."""
        wanted = np.array([hash_text(passage_id) for passage_id in ids], dtype=np.uint64)
        slots = np.minimum(np.searchsorted(self._hashes, wanted), len(self) - 1)
        return np.where(self._hashes[slots] == wanted, self._positions[slots].astype(np.int64), -1)


class JoinedCorpus(Corpus):
    """The passages of several corpora in order; a position counts those that are not deleted.

    No two passages that are left may share an id.
    """

    def __init__(self, parts: Sequence[Corpus], deleted: np.ndarray) -> None:
        """deleted: rows, which are places among the passages of all parts; ascending."""
        self._parts, self.path, self.index_folder = tuple(parts), parts[0].path, None
        self._made_from: Any = parts, deleted
        self._starts = np.cumsum([0, *map(len, parts)])
        self.alive = np.ones(self._starts[-1], bool)
        """Mark the rows that are not deleted. (R,)"""
        self.alive[deleted] = False
        self.rows = np.flatnonzero(self.alive).astype(np.int32) if len(deleted) else None
        self.content_hash = join_hashes([part.content_hash for part in parts], deleted)

    @property
    def parts(self) -> Sequence[Corpus]:
        return self._parts

    def __reduce__(self) -> tuple[Any, ...]:
        return JoinedCorpus, self._made_from

    def __len__(self) -> int:
        return len(self.alive) if self.rows is None else len(self.rows)

    def __getitem__(self, position: SupportsIndex) -> Passage:
        position = operator.index(position)
        if not 0 <= position < len(self):
            raise IndexError(f"passage {position} of {len(self)} in {self.path} and what was added")
        row = position if self.rows is None else int(self.rows[position])
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.parts[part][row - int(self._starts[part])]

    def position_of(self, passage_id: str) -> int | None:
        for part, start in zip(self.parts, self._starts.tolist(), strict=False):
            if (at := part.position_of(passage_id)) is not None and self.alive[start + at]:
                return int(self.positions_of_rows(np.array([start + at]))[0])
        return None

    def positions(self, ids: Sequence[str]) -> np.ndarray:
        found = np.full(len(ids), -1, np.int64)
        for part, start in zip(self.parts, self._starts.tolist(), strict=False):
            at = part.positions(ids)
            known = np.flatnonzero(at >= 0)
            known = known[self.alive[start + at[known]]]
            found[known] = self.positions_of_rows(start + at[known])
        return found

    def positions_of_rows(self, rows: np.ndarray) -> np.ndarray:
        return rows if self.rows is None else np.searchsorted(self.rows, rows)

    def places(self) -> np.ndarray:
        """Return the position of each row, -1 if it was deleted.   (R,)"""
        return np.where(self.alive, np.cumsum(self.alive) - 1, -1)

    def spans(self) -> list[slice]:
        return [slice(*each) for each in pairwise(self._starts.tolist())]


def join_hashes(hashes: Sequence[str], deleted: np.ndarray) -> str:
    """Return the content hash of joined corpora."""
    digest = hashlib.sha256(" ".join(hashes).encode())
    digest.update(np.asarray(deleted, np.int64).tobytes())
    return digest.hexdigest()[:16]


def hash_of(content: bytes) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def hash_text(text: str) -> int:
    """64 bits of a text, which may hold halves of surrogate pairs."""
    return hash_of(text.encode("utf-8", "surrogatepass"))


def _document_of(passage: Passage) -> str:
    """The url of a passage, else its title; "" where it has neither."""
    return str(passage.metadata.get("url") or passage.title)


def _open(path: Path) -> int:
    """A descriptor of the file. Raises DataError."""
    try:
        check_is_file(path)
        if path.suffix == ".gz":
            raise DataError(f"{path}: is compressed, so passages cannot be read alone; gunzip it first")
        if path.stat().st_size == 0:
            raise DataError(f"{path}: holds no passages")
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{path}: {unreadable(error)}") from error


def _stamp(file: int) -> Stamp:
    status = os.fstat(file)
    return status.st_size, status.st_mtime_ns % 2**64


def _read_all(path: Path, descriptor: int) -> Offsets:
    """One pass over the file: check every line, note where it starts, hash it, its id and all bytes."""
    if os.fstat(descriptor).st_size > _SLOW_BYTES:
        logger.info("%s: reading all passages once to note where they start", path)
    stamp, sha, offset, empty, with_metadata = _stamp(descriptor), hashlib.sha256(), 0, [], 0
    starts, lines, ids = array("Q"), array("Q"), array("Q")
    with open(os.dup(descriptor), "rb") as file:
        file.seek(0)
        for number, line in enumerate(file, start=1):
            sha.update(line)
            if not line.isspace():
                try:
                    passage = _parse(line)
                except ValueError as error:
                    raise DataError(f"{path}:{number}: {error}{_hint(path)}") from error
                starts.append(offset)
                lines.append(_hash_line(line))
                ids.append(hash_text(passage.id))
                with_metadata += bool(passage.metadata)
                if not passage.text and not passage.files:
                    empty.append(number)
            offset += len(line)
    if not starts:
        raise DataError(f"{path}: holds no passages")
    if stamp != _stamp(descriptor) or offset != stamp[0]:
        raise CorpusChanged(f"{path}: changed while it was read; start again when nobody writes to it")
    if empty:
        without = counted(len(empty), "passage")
        logger.warning("%s: %s without text, the first on line %d", path, without, empty[0])
    starts.append(offset)
    starts, lines, ids = (np.frombuffer(each, np.uint64) for each in (starts, lines, ids))
    _check_ids_differ(path, descriptor, starts, ids)
    return Offsets.of(stamp, sha.digest(), with_metadata, starts, lines, ids)


def _parse(line: bytes) -> Passage:
    """The passage on a line; ValueError says what is wrong with it."""
    return parse_passage(parse_line(line))


def _hint(path: Path) -> str:
    """Return what to do with a file that another command reads."""
    if path.suffix == ".jsonl":
        return ""
    makes = f"`sleuth corpus --source {path} --out FILE.jsonl`"
    return f"; {makes} makes a corpus of tables, documents and SQuAD's own files"


def _check_ids_differ(path: Path, file: int, starts: np.ndarray, hashes: np.ndarray) -> None:
    order = np.argsort(hashes, kind="stable")
    slots = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    for slot in slots[np.argsort(order[slots + 1])]:  # the first repetition in the file first
        spans = [starts[i : i + 2].tolist() for i in order[slot : slot + 2]]
        first, second = (_parse(os.pread(file, e - s, s)).id for s, e in spans)
        if first == second:  # and not merely the same hash
            there, here = (_line_number(path, start) for start, _ in spans)
            raise DataError(f"{path}:{here}: id {first!r} stands on line {there} already")


def _line_number(path: Path, offset: int) -> int:
    number = 1
    with open(path, "rb") as file:
        while file.tell() < offset:
            file.readline()
            number += 1
    return number


def _hash_line(line: bytes) -> int:
    return hash_of(line.rstrip())  # without the blank lines that follow it
