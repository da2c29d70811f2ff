"""The retriever that answers now, and how another takes its place while requests are in flight.

A request keeps the retriever it began with; the old one is closed when the last of them is done.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data.errors import ConfigError, SleuthError
from data.records import Hit
from retriever_server.retriever import Filter, Query, Retriever, inside

_log = logging.getLogger(__name__)

_WARM_UP_QUERY = "a"


class Opened:
    """A retriever in use: `with opened:` keeps it open although another has taken its place."""

    def __init__(self, retriever: Retriever) -> None:
        self.retriever, self.generation = retriever, retriever.generation
        self._users, self._retired, self._lock = 0, False, threading.Lock()

    def find(self, attribute: str) -> Any:
        """Such as its `encoder`: of the retriever or of the first one inside it that has one, or None."""
        return next(iter(self.find_all(attribute)), None)

    def find_all(self, attribute: str) -> list[Any]:
        """As `find`: all of them, the outermost first."""
        found = (getattr(part, attribute, None) for part in inside(self.retriever))
        return [each for each in found if each]

    def __enter__(self) -> Opened:
        with self._lock:
            self._users += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._leave(1, False)

    def search(self, queries: Sequence[Query], k: int, where: Filter | None) -> list[list[Hit]]:
        """As the retriever does; for worker threads."""
        with self:
            rankings = self.retriever.search(queries, k, where)
            if self.retriever.waits:  # another machine's generation may have changed meanwhile
                self.generation = self.retriever.generation
            return rankings

    def retire(self) -> None:
        """Close it as soon as nobody uses it."""
        self._leave(0, True)

    def _leave(self, users: int, retire: bool) -> None:
        with self._lock:
            was_over = self._retired and not self._users
            self._users -= users
            self._retired |= retire
            over = self._retired and not self._users and not was_over
        if over:
            self.retriever.close()


class Live:
    """A retriever that can be replaced under load by what lies at its place now.

    reopen opens that; stamp changes whenever it may be another. Without them it stays what it is.
    """

    def __init__(
        self,
        retriever: Retriever,
        reopen: Callable[[], Retriever] | None = None,
        stamp: Callable[[], object] | None = None,
    ) -> None:
        self.current = Opened(retriever)
        self._reopen, self._stamp = reopen, stamp
        self._seen = stamp() if stamp else None
        self._one_at_a_time = threading.Lock()
        self.on_swap: Callable[[], object] = lambda: None
        """Called, in some thread, after another generation has taken over."""

    @property
    def generation(self) -> str:
        """That of the retriever that answers new requests."""
        return self.current.generation

    def reload(self) -> bool:
        """Open what lies there now and let it answer; whether it was another generation.

        Takes as long as opening and one search. Raises what they raise; the old one then goes on.
        """
        if self._reopen is None:
            raise ConfigError("this retriever has no place on disk to be opened from again")
        with self._one_at_a_time:
            self._seen = self._stamp() if self._stamp else None
            found = Opened(self._reopen())
            before = self.generation
            if found.generation == before:
                found.retire()
                return False
            found.search([_WARM_UP_QUERY], 1, None)  # what cannot search takes nobody's place
            old, self.current = self.current, found
        old.retire()
        self.on_swap()
        _log.info("swapped %s for %s", before, found.generation)
        return True

    async def watch(self, every_seconds: float) -> None:
        """Reload whenever the stamp changes, for ever; what does not open is logged and left."""
        while self._stamp is not None:
            await asyncio.sleep(every_seconds)
            try:
                # Twice the same: not in the middle of being replaced.
                found = self._stamp()
                if found and found != self._seen and found == self._stamp():
                    await asyncio.to_thread(self.reload)
            except (SleuthError, OSError, ValueError) as error:
                _log.error("%s stays: %s", self.generation, error)
            except Exception:
                _log.exception("%s stays", self.generation)


def stamp(spec: str) -> tuple:
    """Another value once the index folder or YAML file `spec` was replaced; () where it is missing."""
    path = Path(spec)
    try:
        if path.suffix in (".yaml", ".yml"):
            text = path.read_text(encoding="utf-8")
            named = re.findall(r"[^\s,\[\]{}\"']+", text)
            return (text, *(stamp(name) for name in named if "/" in name or name.endswith("ml")))
        status = (path / "manifest.json").stat()
    except (OSError, ValueError):
        return ()
    return status.st_ino, status.st_mtime_ns, status.st_size
