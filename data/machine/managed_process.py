"""A process that does not outlive us: servers and workers that a command starts beside itself."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

# A reader in the same process group waits for the end of a pipe of ours, which comes when we end, however
# that may be; then the group has $0 seconds. Popen's pid is that of the process itself, not of the reader.
WATCHED = (
    'exec 3<&0; (trap "" TERM; read -r _ <&3; [ "$0" = 0 ] || { kill -TERM 0; sleep "$0"; }; kill -KILL 0) & '
    'exec "$@" </dev/null 3<&-'
)


class ManagedProcess:
    """A process in a process group of its own, with all that it starts; it runs from here on."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        grace_seconds: int = 0,
    ) -> None:
        """Start it; its output is added to `log`. environment: all of it; ours if not given.

        grace_seconds: between SIGTERM and SIGKILL where we end first; 0: killed at once.
        """
        self._log, self._started = log, time.monotonic()
        with log.open("ab") as out:
            self._begins = out.tell()
            self.process = subprocess.Popen(
                ["sh", "-c", WATCHED, str(grace_seconds), *command],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment,
                start_new_session=True,  # Ctrl-C is for us alone
            )

    @property
    def status(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self.process.poll()

    @property
    def seconds(self) -> float | None:
        """Seconds since it was started; None once it has ended."""
        return time.monotonic() - self._started if self.status is None else None

    def last_words(self) -> str:
        """The last line with an error that it printed, else its last line."""
        with self._log.open("rb") as file:
            file.seek(self._begins)
            printed = file.read().decode(errors="replace")
        lines = [line.strip() for line in printed.splitlines() if line.strip()]
        said = [line for line in lines if line.startswith("sleuth: ") or "Error:" in line] or lines
        return said[-1].removeprefix("sleuth: ")[-300:] if said else "it printed nothing"

    def kill(self) -> None:
        """End it at once, as a crash would, and what is left of its group."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    def stop(self, seconds: float) -> None:
        """Ask it to end, and kill it after so long; returns when it has ended."""
        if seconds and self.status is None:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        self.kill()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
