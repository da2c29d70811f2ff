"""Files that end in the SHA-256 of what stands before it, so that a flipped bit is noticed on opening."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from data.jsonl import open_atomic

_DIGEST_BYTES = 32


@contextmanager
def write_sealed(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that replaces `path`, sealed, when the block ends well. Raises StorageError."""
    with open_atomic(path, "wb+") as file:
        yield file
        file.seek(0)
        file.write(hashlib.file_digest(file, "sha256").digest())  # type: ignore[arg-type]


def read_sealed(path: Path) -> memoryview | None:
    """The content of a sealed file, mapped; None where it is missing or not as it was written."""
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # an empty file cannot be mapped
        return None
    content = memoryview(mapped)[:-_DIGEST_BYTES]
    return content if hashlib.sha256(content).digest() == mapped[-_DIGEST_BYTES:] else None
