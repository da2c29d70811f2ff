"""Files and folders that appear whole or not at all, and files with a seal.

The new one is made beside the old one, which stays until the new one is complete; then it is renamed.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from data.errors import SleuthError, StorageError, reason_of

_DIGEST_BYTES = 32


def atomic_write(path: str | Path, content: str | bytes, sync: bool = True) -> None:
    """Replace the file by `content` (text as UTF-8), whole or not at all; raises StorageError."""
    with open_atomic(path, "wb", sync) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def open_atomic(path: str | Path, mode: str = "w", sync: bool = True) -> Iterator[IO[Any]]:
    """Open a file ("w": UTF-8 text, "wb": bytes) that replaces `path` when the block ends well.

    Until then it is a temporary file in the same folder, which is made if missing; if the block fails, that
    one is removed and the old file stays. sync: force it to the disk, so that a power cut leaves no empty
    file. A device or pipe (/dev/stdout) is written into. Raises StorageError where the disk refuses.
    """
    there = Path(path)
    path = Path(os.path.realpath(path))  # through a link, so that the link stays one
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    refuse_folder(path)
    try:
        if there.exists() and not there.is_file():  # a file in its place would remove it
            with open(there, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if sync:
            _sync_folder(path.parent)
    except OSError as error:
        if _is_foreign(error, temporary, path):
            raise
        raise StorageError(f"{path}: cannot be written: {reason_of(error)}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def refuse_folder(path: Path) -> None:
    """Raise StorageError where a folder lies at the place of a file to write."""
    if path.is_dir():
        raise StorageError(f"{path}: cannot be written: is a folder, expected a file")


def check_writable(path: str | Path) -> None:
    """Raise StorageError unless a file or folder can be made at `path`; nothing is left there."""
    real = Path(os.path.realpath(path))
    if Path(path).exists() and not (real.is_file() or real.is_dir()):
        return  # a device or pipe
    inside = real.parent if real.is_file() else real
    try:
        with tempfile.TemporaryFile(dir=next(at for at in (inside, *inside.parents) if at.exists())):
            pass
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {reason_of(error)}") from error


@contextmanager
def write_sealed(path: Path) -> Iterator[IO[bytes]]:
    """Open a file as `open_atomic` does; it ends in the SHA-256 of its content, so that damage is noticed."""
    with open_atomic(path, "wb+") as file:
        yield file
        file.seek(0)
        file.write(hashlib.file_digest(file, "sha256").digest())  # type: ignore[arg-type]


def read_sealed(path: Path) -> memoryview | None:
    """Return the content of a sealed file, mapped; None where it is missing or not as it was written."""
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # an empty file cannot be mapped
        return None
    content = memoryview(mapped)[:-_DIGEST_BYTES]
    return content if hashlib.sha256(content).digest() == mapped[-_DIGEST_BYTES:] else None


def stamp_of(path: Path) -> tuple[int, ...]:
    """Return inode, time and size, which are others once the file was replaced; () where there is none."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_mtime_ns, status.st_size


@contextmanager
def new_folder(out: Path, mark: str = "", aside: Path | None = None, shared: bool = False) -> Iterator[Path]:
    """Give a folder to fill, which replaces the folder `out` when the block ends well.

    mark: the file that tells a complete folder, removed before the others. aside: where the old one is for a
    moment on systems that cannot exchange two folders at once. shared: others may be making the same, and the
    first to finish wins; without it, folders that killed processes left are removed.
    """
    prefix = f".{out.name}.building-"
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in () if shared else out.parent.glob(glob.escape(prefix) + "*"):
        remove_folder(left, mark)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    try:
        folder.chmod(0o755)  # mkdtemp makes it private
        yield folder
        _put_in_place(folder, out, mark, aside, shared)
    finally:
        remove_folder(folder, mark)


def make_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """Return `folder`, written by `write(folder)` unless it is there; it appears whole or not at all.

    Of two processes that write at once, the first to finish wins. Raises StorageError.
    """
    if not folder.exists():
        try:
            with new_folder(folder, shared=True) as building:
                write(building)
        except OSError as error:
            raise StorageError(f"{folder}: could not be written ({error})") from error
    return folder


def remove_folder(folder: Path, mark: str = "") -> None:
    """Remove a folder, the file `mark` first: killed in between, what is left is not taken for complete."""
    if mark:
        (folder / mark).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def sync_files(folder: Path) -> None:
    """Force all files of a folder to the disk, so that a power cut leaves none of them empty."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _put_in_place(folder: Path, out: Path, mark: str, aside: Path | None, shared: bool) -> None:
    """Rename `folder` to `out`, which is missing at no moment (a server may have its files mapped)."""
    if not out.exists():
        try:
            os.rename(folder, out)
        except OSError:
            if not (shared and out.exists()):  # else another process was faster
                raise
    elif not shared and not _exchange(folder, out):  # not Linux, or a file system that cannot
        old = aside or folder.with_name(f"{folder.name}.old")
        os.rename(out, old)
        os.rename(folder, out)
        remove_folder(old, mark)


def _exchange(one: Path, other: Path) -> bool:
    """Return whether the two folders have changed places, which Linux can do at once (renameat2)."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and not rename(here, os.fsencode(one), here, os.fsencode(other), exchange)


def _is_foreign(error: OSError, temporary: Path, path: Path) -> bool:
    """Return whether an error out of the caller's block is about something else than writing this file."""
    if isinstance(error, SleuthError | ConnectionError | TimeoutError):
        return True
    ours = (temporary, path, *path.parents)
    return error.filename is not None and Path(error.filename) not in ours


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
