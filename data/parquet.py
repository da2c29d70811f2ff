"""Rows of parquet files; their images into files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from data.errors import ConfigError, DataError
from data.jsonl import atomic_write

_ENDS = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif"}


def parts(folder: Path, part: str) -> list[Path]:
    """The files PART-*.parquet, or PART.parquet, in a folder, sorted; ConfigError where there are none."""
    found = sorted(path for name in (f"{part}-*.parquet", f"{part}.parquet") for path in folder.glob(name))
    if not found:
        raise ConfigError(f"{folder}: no {part}-*.parquet there")
    return found


def parquet_columns(path: Path) -> list[str]:
    """The names of a file's columns; none where it cannot be read."""
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import read_schema

    try:
        return read_schema(path).names
    except (ArrowInvalid, OSError):
        return []


def read_parquet(path: Path, at_once: int = 1000) -> Iterator[dict[str, Any]]:
    """The rows of a file, so many in memory at once; DataError naming it where it cannot be read."""
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(at_once):
                yield from batch.to_pylist()
    except (ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


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


def relative_to(image: str, folder: Path) -> str:
    """An image's path as a corpus in `folder` writes it; "" stays "".   /a/b/x.png, /a -> b/x.png"""
    return Path(os.path.relpath(image, folder)).as_posix() if image else ""
