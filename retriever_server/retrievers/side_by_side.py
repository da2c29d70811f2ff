"""Several retrievers asked at the same time, in threads of their own: the base of `Fuse` and `Sharded`."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from data.errors import ConfigError, RetrieverError, RetrieverUnavailable
from data.records import Hit
from retriever_server.retriever import Filter, Query, Retriever, Wrapper

_IN_FLIGHT = 64  # searches that one part may have under way; a part that hangs takes no more threads

Rankings = list[list[Hit]]


class SideBySide(Wrapper):
    """Asks its parts side by side. Its generation names them all, and the settings that join them."""

    def __init__(self, parts: Sequence[Retriever], settings: Sequence[Any]) -> None:
        if not parts:
            raise ConfigError("parts: must be one or more retrievers")
        super().__init__(*parts)
        kind = type(self).__name__.lower()
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:6]
        self._label = f"{kind}-{digest}" if settings else kind
        self._gates = [threading.Semaphore(_IN_FLIGHT) for _ in parts]

    @property
    def generation(self) -> str:
        """The names of all parts, and a hash of how they are joined."""
        return self._name([part.generation for part in self.parts])

    def _name(self, generations: Sequence[str]) -> str:
        return f"{self._label}({'+'.join(generations)})"

    def _ask(self, asked: Sequence[Sequence[Query]], k: int, where: Filter | None) -> list[Future[Rankings]]:
        each = zip(self.parts, self._gates, asked, strict=True)
        return [_start(part, gate, queries, k, where) for part, gate, queries in each]

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "parts": [part.describe() for part in self.parts]}


def generation_of(part: Retriever, rankings: Rankings) -> str:
    """Return the generation that gave these rankings: that of the hits, since the part's may have changed."""
    return next((hit.generation for ranking in rankings for hit in ranking), part.generation)


def _start(
    part: Retriever, gate: threading.Semaphore, queries: Sequence[Query], k: int, where: Filter | None
) -> Future[Rankings]:
    """Search one part in a thread that does not keep the process alive."""
    future: Future[Rankings] = Future()

    def run() -> None:
        try:
            found = part.search(queries, k, where)
            if len(found) != len(queries):
                raise RetrieverError(f"{part.generation}: {len(found)} rows for {len(queries)} queries")
            future.set_result(found)
        except BaseException as error:
            future.set_exception(error)
        finally:
            gate.release()

    if gate.acquire(blocking=False):
        threading.Thread(target=run, daemon=True).start()
    else:
        future.set_exception(RetrieverUnavailable(f"{_IN_FLIGHT} searches are under way already"))
    return future
