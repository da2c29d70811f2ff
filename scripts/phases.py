"""Phases of a command that takes long: said as they begin, timed, and their seconds kept on disk."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.jsonl import read_json, write_json


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
