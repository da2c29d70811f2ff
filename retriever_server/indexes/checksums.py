"""Files of an index, written whole, and checked: on opening all bytes of the smaller ones, else samples."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from data.atomic import open_atomic
from data.errors import DataError

_BLOCKS, _BLOCK_BYTES = 16, 4096
_WHOLE_BYTES = 1 << 28  # read in a quarter of a second


def save_array(path: Path, array: np.ndarray) -> None:
    """Save as np.save, which may lose the last bytes on a full disk without a word; raises OSError then.

    The file appears whole: who has linked the one that was there keeps that.
    """
    array = np.ascontiguousarray(array)
    with open_atomic(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


def sample_hash(path: Path) -> str:
    """Short hash of the file's size and of 16 blocks of 4 KiB spread over it, first and last among them."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for i in range(_BLOCKS):
            file.seek(max(0, size - _BLOCK_BYTES) * i // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16]


def file_hash(path: Path) -> str:
    """SHA-256 of the file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(
    folder: Path, sizes: dict[str, int], samples: dict[str, str], checksums: dict[str, str], every_byte: bool
) -> None:
    """Raise DataError naming the first file of an index that is not as it was built.

    Compares sizes, and all bytes of files up to 256 MB (of all files with `every_byte`), else sampled blocks.
    """
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            now = "missing" if found is None else f"{found} bytes"
            raise DataError(f"{path}: missing or not {size} bytes ({now}); build the index again")
        whole = every_byte or (size <= _WHOLE_BYTES and bool(checksums))
        built = checksums.get(name) if whole else samples.get(name)
        if (whole or built) and built != (file_hash(path) if whole else sample_hash(path)):
            raise DataError(f"{path}: changed since it was built (another checksum); build the index again")
