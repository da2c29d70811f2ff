"""Processes that are servers, started again at their address: here, or wherever a `Place` like ours is.

A process ends with the one that started it, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from data.errors import ConfigError
from data.machine.managed_process import ManagedProcess

PYTHON = "{python}"
"""Stands in a command for the Python of the machine that runs it."""
Command = Callable[[str, int], Sequence[str]]
"""The command of a server, for its host and port."""
PORT_SECONDS = 10.0
"""Time to wait for a port that a process which has just died still holds."""


class Place:
    """Runs one process at a time on this machine, and says how it is."""

    def __init__(self, host: str = "127.0.0.1", grace_seconds: int = 0) -> None:
        """grace_seconds: between SIGTERM and SIGKILL where we end first."""
        self.host, self.grace_seconds = host, grace_seconds
        self.child: ManagedProcess | None = None

    def address(self, port: int | None = None) -> tuple[str, int]:
        """End what runs, and return the host and a free port: `port` if that is free, or soon."""
        self.stop(0)  # what hangs still holds the port
        until = time.monotonic() + PORT_SECONDS
        while port and time.monotonic() < until:
            with contextlib.suppress(OSError):
                return self.host, _bound(self.host, port)
            time.sleep(0.1)
        return self.host, _bound(self.host, 0)

    def start(
        self, command: Sequence[str], environment: Mapping[str, str | None], folder: str, log: str
    ) -> None:
        """Start it in `folder`, with `environment` beside ours; what it prints is added to `log`.

        A variable that is None is left out. Raises ConfigError where a folder is missing here.
        """
        self.stop(0)
        for needed in (Path(folder), Path(log).parent):
            if not needed.is_dir():
                raise ConfigError(f"{needed}: all machines must see it, and {socket.gethostname()} does not")
        command = [sys.executable if word == PYTHON else word for word in command]
        variables = {
            name: value for name, value in {**os.environ, **environment}.items() if value is not None
        }
        self.child = ManagedProcess(command, Path(log), variables, Path(folder), self.grace_seconds)

    def state(self) -> tuple[int, str] | None:
        """Return None while it runs; then its exit status and the last that it said."""
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


class ServerProcess:
    """A server that can be started again."""

    def __init__(
        self,
        name: str,
        place: Place,
        command: Command,
        environment: Mapping[str, str | None],
        log: Path,
    ) -> None:
        """log: where all that it prints goes."""
        self.name, self.place, self.log = name, place, log
        self._command, self._environment = command, environment
        self._address: tuple[str, int | None] = ("", None)
        self._failure = ""

    def restart(self) -> str:
        """Start it, on its last port if it had one; return its URL. What is left of it is killed."""
        try:
            host, port = self._address = self.place.address(self._address[1])
            command = self._command(host, port)
            self.place.start(command, self._environment, str(Path.cwd()), str(self.log))
            self._failure = ""
        except Exception as error:  # whatever it is, `ended` says so
            self._failure = str(error)
        return "http://{}:{}".format(*self._address)

    def ended(self) -> str | None:
        """Say how it ended, or why it did not start or what it runs on was lost; None while it runs."""
        try:
            state = self.place.state()
            failure = self._failure or (state and f"exit status {state[0]}: {state[1]}")
        except Exception as error:
            failure = str(error)
        return failure and failure.removeprefix(f"{self.name}: ")

    def stop(self, seconds: float) -> None:
        """End it: asked to for so long, then killed."""
        self.place.stop(seconds)


def _bound(host: str, port: int) -> int:
    with socket.socket() as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        return found.getsockname()[1]
