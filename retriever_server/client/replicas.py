"""Several servers of one index as one: the least busy is asked, and what one cannot answer another does.

A replica that breaks a connection, answers 5xx or garbage, or does not answer within its share of the
deadline is out for a while, then asked again. All should serve the same generation: every hit names its own.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from data.errors import ConfigError, RetrieverTimeout, RetrieverUnavailable
from data.records import Passage
from retriever_server.client.http import Http
from retriever_server.retriever import Filter, Outcome, Query

_log = logging.getLogger(__name__)

_FIRST_OUT_SECONDS, _LONGEST_OUT_SECONDS = 0.5, 30.0
_Answer = TypeVar("_Answer")


def open_http(
    urls: str, deadline_seconds: float = 30.0, headers: Mapping[str, str] | None = None
) -> Http | Replicas:
    """Open the server at one URL, or the replicas at several that are separated by commas."""
    if "," not in urls:
        return Http(urls, deadline_seconds, headers=headers)
    return Replicas([url.strip() for url in urls.split(",")], deadline_seconds, headers)


class _Replica(Http):
    """One of them, which is asked once, and how it did lately."""

    patience_seconds = 0.0

    def __init__(self, url: str, deadline_seconds: float, headers: Mapping[str, str] | None) -> None:
        super().__init__(url, deadline_seconds, headers=headers)
        self.asked = self.answered = self.failures = 0
        self.out_until = 0.0

    def put_out(self, failure: Exception) -> None:
        """Ask it no more for a while, which doubles with every failure in a row."""
        if self.out_until > time.monotonic():
            return  # several were asked of it at once
        if not self.failures:
            _log.warning("%s; the other replicas are asked", failure)
        seconds = min(_FIRST_OUT_SECONDS * 2**self.failures, _LONGEST_OUT_SECONDS)
        self.failures, self.out_until = self.failures + 1, time.monotonic() + seconds

    def note_answer(self) -> None:
        """Note that it answered."""
        if self.failures:
            _log.warning("%s: answers again", self.url)
        self.failures, self.out_until, self.answered = 0, 0.0, self.answered + 1


class Replicas:
    """Asks whichever replica is least busy; `deadline_seconds` bounds a request with all its retries."""

    def __init__(
        self, urls: Sequence[str], deadline_seconds: float = 30.0, headers: Mapping[str, str] | None = None
    ) -> None:
        if not urls or len(set(urls)) < len(urls):
            raise ConfigError(f"retriever {','.join(urls)!r}: must be one or more different URLs")
        self.parts = [_Replica(url, deadline_seconds / len(urls), headers) for url in urls]
        self.deadline_seconds, self.window_seconds = deadline_seconds, self.parts[0].window_seconds

    @property
    def url(self) -> str:
        """Their URLs, separated by commas."""
        return ",".join(part.url for part in self.parts)

    async def ask(self, queries: list[Query], k: int) -> Sequence[Outcome]:
        """Return the hits of each query, all from one replica; a refusal is raised as it is, by whomever."""
        return await self._with_any(lambda part: part.ask(queries, k))

    async def probe(self) -> None:
        """As `Http.probe`, of all at once: raises where none of them answers."""
        outcomes = await asyncio.gather(*(Http.probe(part) for part in self.parts), return_exceptions=True)
        failures = [outcome for outcome in outcomes if outcome is not None]
        if len(failures) == len(self.parts):
            raise failures[0]

    async def picture(self, passage: Passage, side: int) -> bytes:
        """As a replica shows it."""
        return await self._with_any(lambda part: part.picture(passage, side))

    async def document(self, passage_id: str) -> Passage | None:
        """As a replica reads it."""
        return await self._with_any(lambda part: part.document(passage_id))

    async def get(self, path: str, seconds: float) -> Any:
        """Return the answer to a GET of the replica that is asked next."""
        return await self._choose().get(path, seconds)

    def filtered(self, where: Filter) -> Replicas:
        """Return the same replicas and connections, asked for what matches alone."""
        found = copy.copy(self)
        found.parts = [part.filtered(where) for part in self.parts]
        return found

    async def close(self) -> None:
        """Close the connections of this event loop."""
        for part in self.parts:
            await part.close()

    async def _with_any(self, act: Callable[[_Replica], Awaitable[_Answer]]) -> _Answer:
        """Return the first answer of a replica; RetrieverUnavailable where there is none by the deadline."""
        start, failure = time.monotonic(), None
        try:
            async with asyncio.timeout(self.deadline_seconds):
                while True:
                    part = self._choose()
                    part.asked += 1
                    try:
                        await asyncio.sleep(max(0.0, part.out_until - time.monotonic()))
                        answer = await act(part)
                        part.note_answer()
                        return answer
                    except (RetrieverUnavailable, RetrieverTimeout) as error:
                        failure = error
                        part.put_out(error)
                    finally:
                        part.asked -= 1
        except TimeoutError:
            seconds, why = time.monotonic() - start, failure or "they hang"
            raise RetrieverUnavailable(
                f"none of {len(self.parts)} replicas answered within {seconds:.1f} s ({why})"
            ) from failure

    def _choose(self) -> _Replica:
        """Return the least busy that is not out, else the one whose time out ends first."""
        now = time.monotonic()
        return min(self.parts, key=lambda part: (max(part.out_until - now, 0), part.asked, part.answered))
