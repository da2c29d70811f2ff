"""Phases of a command that takes long: said as they begin, timed, and their seconds kept on disk."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data.jsonl import read_json, write_json

_STAGE = "import sys; from scripts.__main__ import main; sys.exit(main(sys.argv[1:], says_interrupted=False))"


def run_stage(argv: Sequence[str]) -> int:
    """Run `sleuth ARGV...` in a process of its own; return its exit status.

    Raises KeyboardInterrupt where it was interrupted: its state is saved, and it leaves it to us to say so.
    """
    told_alone = not sys.stdin.isatty()  # a terminal tells its Ctrl-C to both of us, but SIGTERM it does not

    def on_sigterm(*_: object) -> None:
        nonlocal told_alone
        told_alone = True
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        with subprocess.Popen([sys.executable, "-c", _STAGE, *argv]) as process:
            try:
                status = process.wait()
            except KeyboardInterrupt:
                if told_alone:
                    process.send_signal(signal.SIGINT)
                process.wait()
                raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if status in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    return status


class Phases:
    """Wall seconds of each phase, added up over starts and kept on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = read_json(path)["seconds"] if path.exists() else {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time one phase and say so."""
        print(f"-- {name}", flush=True)
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - started)

    def add(self, name: str, seconds: float) -> None:
        """Add to the seconds of a phase."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        write_json(self._path, {"seconds": self.seconds})
