"""Several servers of one index as one: the least busy is asked, and what one cannot answer another does.

One that answers garbage, or not within its share of the deadline, has failed too. All should serve the same
generation: every hit names its own.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from data.errors import RetrieverTimeout, RetrieverUnavailable
from data.records import Passage
from retriever_server.client.http import Http
from retriever_server.client.pool import ServerPool, servers_at
from retriever_server.retriever import Filter, Outcome, Query

_Answer = TypeVar("_Answer")


def open_http(
    urls: str, deadline_seconds: float = 30.0, headers: Mapping[str, str] | None = None
) -> Http | Replicas:
    """Open the server at one URL, or the replicas at several that are separated by commas."""
    if "," not in urls:
        return Http(urls, deadline_seconds, headers=headers)
    return Replicas([url.strip() for url in urls.split(",")], deadline_seconds, headers)


class Replicas:
    """Asks whichever replica is least busy; `deadline_seconds` bounds a request with all its retries."""

    def __init__(
        self, urls: Sequence[str], deadline_seconds: float = 30.0, headers: Mapping[str, str] | None = None
    ) -> None:
        servers = servers_at(urls, "retriever")
        self.pool = ServerPool("retriever", servers, deadline_seconds)
        share = deadline_seconds / len(urls)
        self.parts = {server: Http(server.url, share, headers=headers) for server in servers}
        for part in self.parts.values():
            part.patience_seconds = 0.0  # it is asked once
        self.deadline_seconds, self.window_seconds = deadline_seconds, Http.window_seconds

    @property
    def url(self) -> str:
        """Their URLs, separated by commas."""
        return ",".join(part.url for part in self.parts.values())

    async def ask(self, queries: list[Query], k: int) -> Sequence[Outcome]:
        """Return the hits of each query, all from one replica; a refusal is raised as it is, by whomever."""
        return await self._with_any(lambda part: part.ask(queries, k))

    async def probe(self) -> None:
        """As `Http.probe`, of all at once: raises where none of them answers."""
        outcomes = await asyncio.gather(
            *(part.probe() for part in self.parts.values()), return_exceptions=True
        )
        failures = [outcome for outcome in outcomes if outcome is not None]
        if len(failures) == len(self.parts):
            raise failures[0]

    async def picture(self, passage: Passage, side: int) -> bytes:
        return await self._with_any(lambda part: part.picture(passage, side))

    async def document(self, passage_id: str) -> Passage | None:
        return await self._with_any(lambda part: part.document(passage_id))

    async def get(self, path: str, seconds: float) -> Any:
        """Return the answer to a GET of the replica that is asked next."""
        return await self.parts[self.pool.least_loaded()].get(path, seconds)

    def filtered(self, where: Filter) -> Replicas:
        """Return the same replicas and connections, asked for what matches alone."""
        found = copy.copy(self)
        found.parts = {server: part.filtered(where) for server, part in self.parts.items()}
        return found

    async def close(self) -> None:
        """Close the connections of this event loop."""
        for part in self.parts.values():
            await part.close()

    async def _with_any(self, act: Callable[[Http], Awaitable[_Answer]]) -> _Answer:
        """Return the first answer of a replica; RetrieverUnavailable where there is none by the deadline."""
        start, failure, request = time.monotonic(), None, object()
        try:
            async with asyncio.timeout(self.deadline_seconds):
                while True:
                    server = await self.pool.choose(request)
                    try:
                        answer = await act(self.parts[server])
                        self.pool.mark_up(server)
                        return answer
                    except (RetrieverUnavailable, RetrieverTimeout) as error:
                        failure = error
                        self.pool.mark_down(server, error)
        except TimeoutError:
            seconds, why = time.monotonic() - start, failure or "they hang"
            raise RetrieverUnavailable(
                f"none of {len(self.parts)} replicas answered within {seconds:.1f} s ({why})"
            ) from failure
        finally:
            self.pool.release(request)
