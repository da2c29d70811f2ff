"""Locks between processes, each with its holder's name for whoever finds it taken.

The kernel frees the lock of a dead process, so that what a killed one left behind holds up nobody.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from data.errors import ConfigError, StorageError

logger = logging.getLogger(__name__)


def lock(path: Path, what: str, holder: str, shared: bool = False) -> IO[str]:
    """The file, locked until it is closed, with `holder` in it; `shared` with others that say so, too.

    Raises ConfigError "WHAT by process HOLDER" where another process has it. On a file system without locks
    a warning says so, and nothing is locked.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{what} by process {_holder(file)}") from error
        except OSError as error:
            logger.warning("%s: no locks here (%s): see yourself that no other does the same", path, error)
        if _is_at(path, file):
            break
        file.close()  # its last holder has removed it meanwhile
    with suppress(OSError):  # on a full disk it holds as well, without a name
        file.truncate(0)
        os.write(file.fileno(), f"{holder}\n".encode())
    return file


@contextmanager
def locked(path: Path, what: str, shared: bool = False) -> Iterator[None]:
    """Lock for the block, as this process; the last holder removes the file."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]
    file = lock(path, what, f"{os.getpid()} on {socket.gethostname()} ({command})", shared)
    try:
        yield
    finally:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except OSError:  # others share it
            pass
        file.close()


def _holder(file: IO[str]) -> str:
    """Return who has the lock: it writes that down right after it got it. Closes the file."""
    with file:
        for _ in range(20):
            file.seek(0)
            if found := file.read().strip():
                return found
            time.sleep(0.05)
    return "unknown"


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except OSError:
        return False
