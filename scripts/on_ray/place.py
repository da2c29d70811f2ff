"""One process of a run, on whichever machine Ray has put it: what its actor does there.

The process ends with the actor, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from data.errors import ConfigError
from data.managed_process import ManagedProcess

PYTHON = "{python}"
"""In a command: the Python that Ray runs on that machine."""
PORT_SECONDS = 10.0
"""How long a port is waited for that a process which has just died still holds."""


class Place:
    """Runs one process at a time, and says how it is."""

    def __init__(self) -> None:
        self.child: ManagedProcess | None = None

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
        self.child = ManagedProcess(command, Path(log), {**os.environ, **environment}, Path(folder))

    def state(self) -> tuple[int, str] | None:
        """None while it runs; then its exit status and the last that it said."""
        if self.child is None:
            return (1, "it was not started")
        status = self.child.status
        if status is None:
            return None
        self.child.kill()  # what it started may outlive it
        if status < 0:
            return status, f"killed by {signal.Signals(-status).name}"
        return status, self.child.last_words()

    def stop(self, seconds: float) -> None:
        """End it: asked to for so long, then killed; returns when it has ended."""
        if self.child is not None:
            self.child.stop(seconds)


def _bound(host: str, port: int) -> int:
    with socket.socket() as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        return found.getsockname()[1]
