"""A corpus on disk: its passages by position or by id, through a memory map, never all in memory.

Beside the corpus (or where it is told) lies a sidecar of offsets, 24 bytes a passage, mapped too. The
first, checking pass over the file makes it; it is used while size and time of the file stay the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import operator
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError, StorageError
from data.jsonl import open_atomic, parse_line
from data.modalities import modalities
from data.records import Passage

logger = logging.getLogger(__name__)

_MAGIC = 0x534C45555448_0001  # "SLEUTH", layout 1
_HEADER = 5  # magic, size, modification time, content hash, number of passages


class Corpus:
    """The passages of a JSON lines file; `corpus[i]` is that on its i-th line that is not blank.

    A line is {"id", "contents"} as in Search-R1 (title on the first line, in double quotes, then
    the text), {"id", "title", "text"}, or a mixture; "metadata", an object, may stand beside them, and
    "image", a file (or a page of one, "report.pdf#page=3") whose path starts at the corpus's folder; a file
    of another registered modality (`data.modalities`) likewise, under its name.
    Reading is safe from many threads.
    """

    def __init__(self, path: str | Path, sidecar_folder: str | Path | None = None) -> None:
        """Open `path`, not compressed; the first time every line is checked.

        The sidecar goes into `sidecar_folder`; without one, beside the corpus or else into the
        user's cache. Where none can be written it stays in memory. Raises DataError
        "FILE:LINE: what is wrong" for a malformed line, a missing, empty or repeated id. Passages
        without text and image are kept; a warning counts them.
        """
        self.path = Path(path)
        self._folder = self.path.parent.resolve()  # where images are looked for, wherever this process goes
        self._sidecar_folder = sidecar_folder
        self._bytes, stamp = _map(self.path)
        places = _sidecar_places(self.path, sidecar_folder)
        table = next((t for t in map(_load_sidecar, places) if _is_fresh(t, stamp)), None)
        if table is None:
            table = _build_table(self.path, self._bytes, stamp)
            _save_sidecar(table, places)
        count = int(table[4])
        self.content_hash = f"{int(table[3]):016x}"
        """First 16 hexadecimal digits of the SHA-256 of the file's bytes."""
        self._starts, self._hashes, self._positions = np.split(  # (P + 1,), (P,), (P,)
            table[_HEADER:], [count + 1, 2 * count + 1]
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Corpus, (self.path, self._sidecar_folder)  # another process maps the file itself

    def __len__(self) -> int:
        return len(self._hashes)

    def __getitem__(self, position: int) -> Passage:
        """The passage at `position`, from 0; IndexError beyond, and for -1, an index's "none"."""
        position = operator.index(position)
        if not 0 <= position < len(self):
            raise IndexError(f"passage {position} of {len(self)} in {self.path}")
        start, end = self._starts[position : position + 2].tolist()
        try:
            passage = parse_passage(parse_line(self._bytes[start:end]))
        except ValueError as error:  # checked once, maybe by who knew more modalities
            raise DataError(f"{self.path}: passage {position}: {error}") from error
        if not passage.files:
            return passage
        files = {name: str(self._folder / file) for name, file in passage.files.items()}
        return replace(passage, image=files.pop("image", ""), media=files)

    def __iter__(self) -> Iterator[Passage]:
        return (self[position] for position in range(len(self)))

    def get(self, passage_id: str) -> Passage | None:
        """The passage with this id, or None."""
        wanted = np.uint64(_hash_id(passage_id))
        first = int(np.searchsorted(self._hashes, wanted))
        for slot in range(first, len(self)):  # one turn, but for two ids of the same hash
            if self._hashes[slot] != wanted:
                break
            if (passage := self[int(self._positions[slot])]).id == passage_id:
                return passage
        return None

    def positions(self, ids: Sequence[str]) -> np.ndarray:
        """The position of each id, -1 for one that none has. (N,), int64; goes by 64 bits of hash alone."""
        wanted = np.array([_hash_id(passage_id) for passage_id in ids], dtype=np.uint64)
        slots = np.minimum(np.searchsorted(self._hashes, wanted), len(self) - 1)
        return np.where(self._hashes[slots] == wanted, self._positions[slots].astype(np.int64), -1)


def parse_passage(record: Mapping[str, Any]) -> Passage:
    """The passage in one record of a corpus; ValueError says what is wrong with it.

    {"id": "7", "contents": '"Rome"\\nA city.'} -> Passage("7", text="A city.", title="Rome")
    """
    title, text = record.get("title"), record.get("text")
    files = {name: file for name in modalities() if (file := _checked_string(name, record.get(name) or ""))}
    if text is None:
        contents = record.get("contents", "" if files else None)
        if contents is None:
            others = "".join(f' nor "{name}"' for name in ("text", *modalities()))
            raise ValueError(f'neither "contents"{others}')
        title, text = _split_contents(_checked_string("contents", contents), title)
    return Passage(
        id=_checked_id(record.get("id")),
        text=_checked_string("text", text).strip(),
        title=_checked_string("title", title or "").strip(),
        metadata=_checked_metadata(record.get("metadata")),
        image=files.pop("image", ""),
        media=files,
    )


def _split_contents(contents: str, title: Any) -> tuple[Any, str]:
    """Title and text; a title that the record gives besides wins over the first line."""
    first, newline, rest = contents.lstrip().partition("\n")
    first = first.strip()
    unquoted = first[1:-1] if len(first) > 1 and first[0] == first[-1] == '"' else first
    if title is not None:
        return title, rest if newline and title and unquoted == title else contents
    return (unquoted, rest) if newline else ("", contents)


def _checked_id(value: Any) -> str:
    if value is None or value == "":
        raise ValueError('no "id"')
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f'"id" must be a string, found {json.dumps(value)[:40]}')
    return str(value)


def _checked_string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f'"{name}" must be a string, found {json.dumps(value)[:40]}')
    return value


def _checked_metadata(value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f'"metadata" must be an object, found {json.dumps(value)[:40]}')
    return value or {}


def _map(path: Path) -> tuple[mmap.mmap, tuple[int, int, int]]:
    """The bytes of the file, and what a sidecar of these bytes starts with."""
    if path.suffix == ".gz":
        raise DataError(f"{path}: a compressed corpus cannot be mapped; gunzip it first")
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size == 0:
                raise DataError(f"{path}: holds no passages")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return mapped, (_MAGIC, status.st_size, status.st_mtime_ns % 2**64)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "no such file" if missing else f"cannot be read: {error.strerror or error}"
        raise DataError(f"{path}: {reason}") from error


def _build_table(path: Path, mapped: mmap.mmap, stamp: tuple[int, int, int]) -> np.ndarray:
    """One pass over the file: check every line, note where it starts, hash its id and all bytes.

    -> uint64: header (magic, size, time, content hash, P), starts (P + 1,), sorted id hashes (P,)
    and the position that each of these belongs to (P,).
    """
    logger.info("%s: reading all passages once to note where they start", path)
    starts, hashes, sha, offset, empty = array("Q"), array("Q"), hashlib.sha256(), 0, []
    for number, line in enumerate(iter(mapped.readline, b""), start=1):
        sha.update(line)
        if not line.isspace():
            try:
                passage = parse_passage(parse_line(line))
            except ValueError as error:
                raise DataError(f"{path}:{number}: {error}") from error
            hashes.append(_hash_id(passage.id))
            starts.append(offset)
            if not passage.text and not passage.files:
                empty.append(number)
        offset += len(line)
    if not starts:
        raise DataError(f"{path}: holds no passages")
    if empty:
        logger.warning("%s: %d passages without text, the first on line %d", path, len(empty), empty[0])
    starts.append(offset)
    id_hashes = np.frombuffer(hashes, dtype=np.uint64)
    order = np.argsort(id_hashes, kind="stable")
    _check_ids_differ(path, mapped, starts, id_hashes[order], order)
    header = np.array([*stamp, int.from_bytes(sha.digest()[:8]), len(id_hashes)], dtype=np.uint64)
    start_offsets = np.frombuffer(starts, dtype=np.uint64)
    return np.concatenate([header, start_offsets, id_hashes[order], order.astype(np.uint64)])


def _check_ids_differ(
    path: Path, mapped: mmap.mmap, starts: array, sorted_hashes: np.ndarray, order: np.ndarray
) -> None:
    slots = np.flatnonzero(sorted_hashes[1:] == sorted_hashes[:-1])
    for slot in slots[np.argsort(order[slots + 1])]:  # the first repetition in the file first
        first, second = order[slot : slot + 2].tolist()
        ids = [parse_passage(parse_line(mapped[starts[i] : starts[i + 1]])).id for i in (first, second)]
        if ids[0] == ids[1]:  # and not merely the same hash
            here, there = (_line_number(mapped, starts[i]) for i in (second, first))
            raise DataError(f"{path}:{here}: id {ids[0]!r} stands on line {there} already")


def _line_number(mapped: mmap.mmap, offset: int) -> int:
    chunk = 1 << 20
    return 1 + sum(mapped[at : min(at + chunk, offset)].count(b"\n") for at in range(0, offset, chunk))


def _hash_id(passage_id: str) -> int:
    digest = hashlib.blake2b(passage_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest)


def _sidecar_places(path: Path, folder: str | Path | None) -> list[Path]:
    name = f"{path.name}.offsets.npy"
    if folder is not None:
        return [Path(folder) / name]
    places = [path.with_name(name)]
    try:
        cache = Path.home() / ".cache" / "sleuth" / "corpora"
    except RuntimeError:  # a user without a home
        return places
    whose = hashlib.sha256(str(path.resolve()).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return [*places, cache / f"{whose}.{name}"]


def _load_sidecar(place: Path) -> np.ndarray | None:
    try:
        # A plain view of the map: slicing np.memmap itself is slow.
        return np.load(place, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    except (OSError, ValueError, EOFError):
        return None


def _is_fresh(table: np.ndarray | None, stamp: tuple[int, int, int]) -> bool:
    if table is None or table.dtype != np.uint64 or table.ndim != 1 or len(table) < _HEADER:
        return False
    count = int(table[4])
    return tuple(table[:3].tolist()) == stamp and len(table) == _HEADER + 3 * count + 1


def _save_sidecar(table: np.ndarray, places: list[Path]) -> None:
    for place in places:
        try:
            with open_atomic(place, "wb") as file:
                np.save(file, table)
            return
        except StorageError as error:
            logger.info("%s", error)
    logger.warning("offsets stay in memory: none of %s can be written", ", ".join(map(str, places)))
