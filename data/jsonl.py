"""JSON lines and JSON on disk: a wrong line is named, a file is written whole or not at all.

A file whose name ends in .gz is read and written compressed.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

from data.errors import DataError, SleuthError, StorageError, reason_of
from data.text import replace_halves_in


def read_jsonl(path: str | Path, tolerate_cut_tail: bool = False) -> Iterator[dict[str, Any]]:
    """The objects of a JSON lines file, one at a time; blank lines are skipped.

    tolerate_cut_tail: leave out a last line that has no newline and does not parse (a writer was
    killed in mid-line). Raises DataError "FILE:LINE: what is wrong"; at once where no file is.
    """
    return (record for _, record in numbered_jsonl(path, tolerate_cut_tail))


def numbered_jsonl(path: str | Path, tolerate_cut_tail: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read as `read_jsonl`, each object with its line number, counted from 1."""
    check_is_file(Path(path))
    return _numbered_objects(Path(path), tolerate_cut_tail)


def parse_line(line: bytes) -> dict[str, Any]:
    """The object on one line, byte order mark or not; ValueError says what else it is."""
    try:
        value = json.loads(line.decode("utf-8-sig").rstrip())
        if b"\\u" in line:
            value = replace_halves_in(value, line)
    except json.JSONDecodeError as error:
        wrong = "one object a line, no comma after it" if error.msg == "Extra data" else error.msg
        raise ValueError(f"not valid JSON ({wrong}: column {error.colno})") from error
    except UnicodeDecodeError as error:
        packed = next((name for start, name in _PACKED.items() if line.startswith(start)), None)
        where = f"(byte {error.start + 1} of the line)"
        wrong = f"compressed by {packed}" if packed else f"not valid UTF-8 {where}"
        raise ValueError(wrong) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected an object {{...}}, found {_JSON_NAMES[type(value)]}")
    return value


def write_jsonl(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one object a line; the old file stays until all are on disk. Raises StorageError."""
    from data.atomic import open_atomic

    with open_atomic(path, "wb") as file:
        if Path(path).suffix == ".gz":
            # No name and no time inside: the same records give the same bytes.
            with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
                packed.writelines(map(_line, records))
        else:
            file.writelines(map(_line, records))


def append_jsonl(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add objects to the end of an uncompressed file; they are on disk when this returns.

    A last line that a crash cut short is removed first, so that nothing is glued to it.
    Raises StorageError.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            _mend_tail(file)
            file.writelines(map(_line, records))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {reason_of(error)}") from error


def append_in_batches(
    out: Path,
    count: int,
    size: int,
    rows: Callable[[range], Iterable[Mapping[str, Any]]],
    progress: Callable[[range], Iterable[int]] = iter,
) -> None:
    """Write `rows` of each batch of so many positions to `out`.part, which becomes `out` when all are there.

    Started again after it was killed, it goes on after the last complete batch.
    """
    from data.atomic import refuse_folder

    refuse_folder(out)
    part = out.with_name(f"{out.name}.part")
    for start in progress(range(_keep_whole_batches(part, size), count, size)):
        append_jsonl(part, rows(range(start, min(start + size, count))))
    os.replace(part, out)


def read_json(path: str | Path) -> Any:
    """The value in a JSON file; DataError with line and column where it is malformed or missing."""
    check_is_file(Path(path))
    try:
        content = Path(path).read_bytes()
        return replace_halves_in(json.loads(content.decode("utf-8-sig")), content)
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}"
        raise DataError(f"{where}: not valid JSON ({error.msg}: column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {reason_of(error)}") from error


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, replacing the file as a whole; StorageError if that fails."""
    from data.atomic import atomic_write

    atomic_write(path, _encode(value, indent=2) + b"\n")


def check_is_file(path: Path) -> None:
    """Raise DataError where no file is that can be read more than once."""
    if path.is_file():
        return
    if not path.exists():
        raise DataError(f"{path}: no such file")
    raise DataError(f"{path}: is a {'folder' if path.is_dir() else 'pipe or device'}, expected a file")


def read_text(path: Path) -> str:
    """The text of a file that somebody wrote, without a byte order mark. Raises DataError."""
    check_is_file(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {reason_of(error)}") from error


_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz"}
"""First bytes of files that are often met packed. One whose name ends in .gz is unpacked before."""
_JSON_NAMES = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def _numbered_objects(path: Path, tolerate_cut_tail: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    number, line = 0, b""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip(b" \t\r\n\xef\xbb\xbf"):
                    yield number, parse_line(line)
    except SleuthError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read after line {number}: {reason_of(error)}") from error
    except ValueError as error:
        # Only the last line of a file can lack its newline.
        if not (tolerate_cut_tail and not line.endswith(b"\n")):
            raise DataError(f"{path}:{number}: {error}") from error


def _encode(value: Any, indent: int | None = None) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent).encode()
    except UnicodeEncodeError:  # half of a surrogate pair: only an escape can hold it
        return json.dumps(value, indent=indent).encode()


def _line(record: Mapping[str, Any]) -> bytes:
    return _encode(record) + b"\n"


def _mend_tail(file: IO[bytes]) -> None:
    """Make the file end in a newline: after a whole last object, or by cutting off a broken one."""
    end = file.seek(0, os.SEEK_END)
    tail = b""
    while end and b"\n" not in tail:
        step = min(end, 1 << 16)
        end -= step
        file.seek(end)
        tail = file.read(step) + tail
    line = tail.rpartition(b"\n")[2]
    if not line:
        return
    try:
        parse_line(line)
        file.write(b"\n")
    except ValueError:
        file.truncate(end + len(tail) - len(line))


def _keep_whole_batches(part: Path, size: int) -> int:
    """Cut the file after its last complete batch; return how many lines stay."""
    if not part.exists():
        return 0
    with open(part, "rb+") as file:
        whole = sum(line.endswith(b"\n") for line in file) // size * size
        file.seek(0)
        file.truncate(sum(len(line) for line in islice(file, whole)))
    return whole
