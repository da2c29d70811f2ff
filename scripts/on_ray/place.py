"""One process of a run, on whichever machine Ray has put it: what its actor does there.

The process ends with the actor, however that ends: a reader in its process group waits for the end of a pipe.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from data.errors import ConfigError

# What keeps running beside the process is the reader alone: Popen's pid is that of the process itself.
WATCHED = 'exec 3<&0; (read -r _ <&3; kill -KILL 0) & exec "$@" </dev/null 3<&-'


PYTHON = "{python}"
"""In a command: the Python that Ray runs on that machine."""
PORT_SECONDS = 10.0
"""How long a port is waited for that a process which has just died still holds."""


class Place:
    """Runs one process at a time, and says how it is."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._log, self._begins = Path(), 0

    def address(self, port: int | None = None) -> tuple[str, int]:
        """This machine's address, and a free port of it: `port` if that is free, or soon."""
        import ray  # pyright: ignore[reportMissingImports]  (an extra)

        host = ray.util.get_node_ip_address()
        until = time.monotonic() + PORT_SECONDS
        while port and time.monotonic() < until:
            with contextlib.suppress(OSError):
                return host, _bound(host, port)
            time.sleep(0.1)
        return host, _bound(host, 0)

    def start(self, command: Sequence[str], environment: Mapping[str, str], folder: str, log: str) -> None:
        """Start it in `folder`, with `environment` beside the actor's; what it prints is added to `log`.

        The word PYTHON stands for this machine's. Raises ConfigError where a folder is missing here.
        """
        self.stop(0)
        for needed in (Path(folder), Path(log).parent):
            if not needed.is_dir():
                raise ConfigError(f"{needed}: all machines must see it, and {socket.gethostname()} does not")
        command = [sys.executable if word == PYTHON else word for word in command]
        self._log = Path(log)
        with self._log.open("ab") as out:
            self._begins = out.tell()
            self._process = subprocess.Popen(
                ["sh", "-c", WATCHED, "sh", *command],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    def state(self) -> tuple[int, str] | None:
        """None while it runs; then its exit status and the last that it said."""
        if self._process is None:
            return (1, "it was not started")
        status = self._process.poll()
        if status is None:
            return None
        self._signal(signal.SIGKILL)  # what it started may outlive it
        if status < 0:
            return status, f"killed by {signal.Signals(-status).name}"
        return status, _last_words(self._log, self._begins)

    def stop(self, seconds: float) -> None:
        """End it: asked to for so long, then killed; returns when it has ended."""
        if self._process is None:
            return
        if seconds and self._process.poll() is None:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def _bound(host: str, port: int) -> int:
    with socket.socket() as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        return found.getsockname()[1]


def _last_words(log: Path, begins: int) -> str:
    with log.open("rb") as file:
        file.seek(begins)
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("sleuth: ") or "Error" in line] or lines
    return said[-1].removeprefix("sleuth: ")[-300:] if said else "it printed nothing"
