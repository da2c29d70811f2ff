"""The rows of a file, each with its place: JSON lines, a JSON array, parquet, Arrow, CSV, TSV.

CSV has quotes; TSV has none: a tab ends a field and a line end a row. Those of text may end in .gz; a byte
order mark is passed over. What cannot be read is a DataError "FILE:LINE: what is wrong".
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

from data.atomic import atomic_write
from data.errors import ConfigError, DataError
from data.formats.squad import Squad, is_squad, parse_squad
from data.jsonl import check_is_file, numbered_jsonl
from data.text import replace_halves_in

Rows = Iterator[tuple[str, dict[str, Any]]]
"""The place of a row ("FILE:LINE", or "FILE: row N", from 1), and its columns."""

_BINARY = (".parquet", ".arrow", ".feather")
KINDS = (".jsonl", ".json", *_BINARY, ".csv", ".tsv")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_ENDS = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif"}
_BLANKS = re.compile(r"[ \t]+")
_CHUNK = 1 << 20
_DECODER, _END = json.JSONDecoder(), object()
_DATA = re.compile(r'\s*\{\s*"Data"\s*:\s*\[\s*(\])?')
"""Beginning of the rows in TriviaQA's own files."""
_OPENING, _SEPARATOR = re.compile(r"\s*\[\s*(\])?"), re.compile(r"\s*(?:,|(\]))\s*")


def ending_of(path: Path) -> str:
    """The end of the name of a file, without .gz.   "a.JSONL.gz" -> ".jsonl" """
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_rows(path: Path, at_once: int = 1000) -> Rows:
    """The rows of a file, by the end of its name; what is none of the others is JSON.

    at_once: rows of parquet that are in memory together.
    """
    if ending_of(path) in _BINARY:
        return _numbered(path, _read_binary(path, at_once))
    if ending_of(path) in (".csv", ".tsv"):
        return _read_table(path)
    start = _start_of(path)
    if is_squad(start):
        return _numbered(path, read_squad(path).questions)
    if start.lstrip().startswith("["):
        return _read_array(path)
    if _DATA.match(start):
        return _read_array(path, _DATA)
    return ((f"{path}:{number}", row) for number, row in numbered_jsonl(path))


def read_squad(path: Path) -> Squad:
    """The content of one of SQuAD's own files. Raises DataError."""
    with _opened(path) as file, at(f"{path}: not in SQuAD's form"):
        content = file.read()
        return parse_squad(replace_halves_in(json.loads(content), content.encode()))


def is_squad_file(path: Path) -> bool:
    """Return whether it is one of SQuAD's own files."""
    return path.is_file() and ending_of(path) == ".json" and is_squad(_start_of(path))


def read_part(folder: Path, name: str, at_once: int = 1000) -> Rows:
    """The rows of NAME.jsonl in a folder, or else of its NAME-*.parquet or NAME.parquet."""
    lines = folder / f"{name}.jsonl"
    paths = parts(folder, name) if not lines.exists() and any(folder.glob(f"{name}*.parquet")) else [lines]
    return (row for path in paths for row in read_rows(path, at_once))


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a text file that are not blank, each with its place, without its line end."""
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", line.rstrip("\n")


def fields_of(line: str, *counts: int, comma: bool = False, open_end: bool = False) -> list[str]:
    """The fields of a line: with tabs between where that gives one of `counts`, else with blanks.

    So ids with blanks stand in tables with tabs. comma: the line is one of CSV. open_end: between blanks, all
    that is left over belongs to the last field.
    """
    fields = next(csv.reader([line])) if comma else line.split("\t")
    if len(fields) not in counts and not comma:
        fields = _BLANKS.split(line.strip(), maxsplit=max(counts) - 1 if open_end else 0)
    if len(fields) not in counts:
        raise ValueError(f"{len(fields)} fields, expected {' or '.join(map(str, counts))}")
    return fields


def table_line(*fields: object) -> str:
    """A line of a table, with tabs between; ValueError for what would not come back from it."""
    for number, field in enumerate(fields):
        text = str(field)
        mark = number == 0 and text.startswith("\ufeff")  # it would be taken for that of the file
        if mark or not text.strip() or re.search(r"[\t\r\n\ud800-\udfff]", text):
            where = "the first field" if number == 0 else f"field {number + 1}"
            raise ValueError(f"{text!r} as {where}: a table cannot hold it (tabs, line ends, nothing at all)")
    return "\t".join(map(str, fields)) + "\n"


def parts(folder: Path, part: str) -> list[Path]:
    """The files PART-*.parquet, or PART.parquet, in a folder, sorted; ConfigError where there are none."""
    found = sorted(path for name in (f"{part}-*.parquet", f"{part}.parquet") for path in folder.glob(name))
    if not found:
        raise ConfigError(f"{folder}: no {part}-*.parquet there")
    return found


def parquet_columns(path: Path) -> list[str]:
    """The names of a file's columns; none where it cannot be read."""
    from pyarrow import ArrowException
    from pyarrow.parquet import read_schema

    try:
        return read_schema(path).names
    except (ArrowException, OSError):
        return []


def saved_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each split that `datasets` wrote with save_to_disk; {} where it is no such folder."""
    infos = sorted(folder.glob("dataset_info.json")) or sorted(folder.glob("*/dataset_info.json"))
    found = {info.parent.name: sorted(info.parent.glob("data-*.arrow")) for info in infos}
    return {split: files for split, files in found.items() if files}


def _read_binary(path: Path, at_once: int) -> Iterator[dict[str, Any]]:
    """The rows of a parquet or Arrow file."""
    from pyarrow import ArrowException

    check_is_file(path)
    try:
        for batch in (_parquet if ending_of(path) == ".parquet" else _arrow)(path, at_once):
            yield from batch.to_pylist(maps_as_pydicts="lossy")
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read: {str(error).splitlines()[0][:200]}") from error


def _parquet(path: Path, at_once: int) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        yield from file.iter_batches(at_once)


def _arrow(path: Path, at_once: int) -> Iterator[Any]:
    """The batches of an Arrow stream, as `datasets` saves it, or of an Arrow file, as Feather is one."""
    from pyarrow import ipc, memory_map

    with memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            reader = ipc.open_file(source)
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            yield from ipc.open_stream(source)


def image_file(value: Any, beside: Path, into: Path) -> str:
    """The path of a row's image: a path, which starts at `beside`, or {"bytes", "path"} as data sets have it.

    Bytes are written to `into`, under a name made of them. "" for None; ValueError for what is none of these.
    """
    if value is None or value == "":
        return ""
    if isinstance(value, str):
        return str(beside / value)
    content = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(content, bytes):
        if isinstance(value, Mapping) and isinstance(value.get("path"), str):
            return str(beside / value["path"])
        raise ValueError(f"an image must be a path or bytes, found {type(value).__name__}")
    end = next((end for start, end in _ENDS.items() if content.startswith(start)), ".img")
    path = into / f"{blake2b(content, digest_size=8).hexdigest()}{end}"
    if not path.is_file():
        atomic_write(path, content)
    return str(path)


@contextmanager
def at(place: str) -> Iterator[None]:
    """Name the place in what is wrong there: a DataError of a ValueError, or of a column that is missing."""
    try:
        yield
    except DataError:
        raise
    except KeyError as error:
        raise DataError(f"{place}: no {error}") from error
    except ValueError as error:
        raise DataError(f"{place}: {error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[io.TextIOWrapper]:
    """A text file to read: UTF-8, or UTF-16 with its mark."""
    check_is_file(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as raw:
            encoding = "utf-16" if raw.peek(2)[:2] in _UTF16 else "utf-8-sig"
            with io.TextIOWrapper(raw, encoding) as file:  # type: ignore[arg-type]
                yield file
    except UnicodeDecodeError as error:
        wrong = f"not UTF-8 (it holds the byte 0x{error.object[error.start]:02x})"
        raise DataError(f"{path}: cannot be read: {wrong}; iconv makes it of other encodings") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _read_table(path: Path) -> Rows:
    """The rows of CSV or TSV under the names of its first line."""
    names: list[str] = []
    lines = ((place, [*map(_unquoted, line.split("\t"))]) for place, line in read_lines(path))
    for place, values in _read_csv(path) if ending_of(path) == ".csv" else lines:
        if not names:
            names = [name.strip() for name in values]
            if len(names) == 1 and (mark := re.search(r"[;,|\t]", names[0])):
                between = "commas" if ending_of(path) == ".csv" else "tabs"
                raise DataError(
                    f"{place}: {mark[0]!r} between columns: {ending_of(path)} has {between} there"
                )
            if len(set(names)) < len(names):
                raise DataError(f"{place}: a column stands there twice: {', '.join(names)}")
        elif len(values) != len(names):
            raise DataError(f"{place}: expected {len(names)} fields, found {len(values)}")
        else:
            yield place, dict(zip(names, values, strict=True))


def _unquoted(cell: str) -> str:
    """Return a cell of TSV without the quotes that pandas puts around it, where it doubles those inside."""
    inside = cell[1:-1].replace('""', "")
    quoted = cell[:1] == cell[-1:] == '"' and '""' in cell[1:-1] and '"' not in inside
    return cell[1:-1].replace('""', '"') if quoted else cell


def _read_csv(path: Path) -> Iterator[tuple[str, list[str]]]:
    csv.field_size_limit(1 << 30)
    with _opened(path) as file:
        file.reconfigure(newline="")
        reader = csv.reader(file, strict=True)
        try:
            yield from ((f"{path}:{reader.line_num}", values) for values in reader if values)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not valid CSV ({error})") from error


def _start_of(path: Path) -> str:
    with _opened(path) as file:
        return file.read(1024)


def _numbered(path: Path, rows: Iterable[dict[str, Any]]) -> Rows:
    return ((f"{path}: row {number}", row) for number, row in enumerate(rows, start=1))


def _read_array(path: Path, opening: re.Pattern[str] = _OPENING) -> Rows:
    """The objects of a JSON array, without reading a large file whole."""
    with _opened(path) as file:
        text, start, line, number = "", 0, 1, 0
        while True:
            try:
                row, end = _next_item(text, start, _SEPARATOR if number else opening)
            except RecursionError as error:
                raise DataError(f"{path}: row {number + 1}: nested too deeply") from error
            except json.JSONDecodeError as error:
                if not (more := file.read(_CHUNK)):
                    where = f"{path}:{line + text.count(chr(10), 0, error.pos)}"
                    raise DataError(f"{where}: not valid JSON ({error.msg})") from error
                line, text, start = line + text.count("\n", 0, start), text[start:] + more, 0
                continue
            if row is _END:
                if opening is _OPENING and (text[end:] + file.read()).strip():
                    raise DataError(f"{path}: holds more after the end of its array")
                return
            number += 1
            if not isinstance(row, dict):
                raise DataError(f"{path}: row {number}: expected an object {{...}}")
            yield f"{path}: row {number}", replace_halves_in(row, text[start:end].encode())
            start = end


def _next_item(text: str, start: int, opening: re.Pattern[str]) -> tuple[Any, int]:
    """The item of an array that begins with `opening` after `start`, or _END, and where it ends."""
    before = opening.match(text, start)
    if before is None:
        raise json.JSONDecodeError("Expecting ',' or ']'", text, start)
    return (_END, before.end()) if before[1] else _DECODER.raw_decode(text, before.end())
