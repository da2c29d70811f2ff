"""`Remote`: a Sleuth or Search-R1 server at the other end of a connection, or replicas of one."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace

from data.errors import RetrieverError, RetrieverRefused, RetrieverUnavailable, require
from data.records import Hit, Passage
from data.secret import read_secret
from retriever_server.client.bridge import Bridge
from retriever_server.client.http import open_http
from retriever_server.client.wire import with_image_bytes
from retriever_server.retriever import Filter, Outcome, Query, Retriever

logger = logging.getLogger(__name__)

_STALE_SECONDS = 1.0
"""Time for which a server's generation is believed."""
_HEALTH_SECONDS = 2.0


class Remote(Retriever):
    """Any server that speaks Search-R1's `POST /retrieve`, ours among them; replicas separated by commas."""

    waits = True

    def __init__(self, url: str, deadline_seconds: float = 30.0, token_file: str | None = None) -> None:
        """`deadline_seconds` bounds a search with all its retries; `token_file` holds a bearer token."""
        headers = {"Authorization": f"Bearer {read_secret(token_file, 'token_file')}"} if token_file else {}
        self._http = open_http(url, deadline_seconds, headers)
        self.window_seconds, self._bridge = self._http.window_seconds, Bridge()
        self._last = ""
        self._asked_at, self._says_generation = -math.inf, True
        self._takes_images: tuple[str, bool] | None = None  # of a generation

    @property
    def generation(self) -> str:
        """The name that the server gives itself, asked once a second; else what answered last, or its URL."""
        if self._says_generation and time.monotonic() - self._asked_at > _STALE_SECONDS:
            self._asked_at = time.monotonic()
            self._last = self._bridge.run(self._ask_generation()) or self._last
        return self._last or self._unnamed

    @property
    def _unnamed(self) -> str:
        return f"remote({self._http.url})"

    async def _ask_generation(self) -> str:
        """Return "" where nobody says; a server that knows no /healthz is not asked again."""
        try:
            generation = (await self._http.get("/healthz", _HEALTH_SECONDS)).get("generation")
        except RetrieverUnavailable:
            return ""
        except RetrieverRefused:
            generation = None
        self._says_generation = bool(generation)
        return str(generation or "")

    def takes_images(self) -> bool:
        """Read it in the server's /v1/info; True where it is not there: let the search tell."""
        generation = self.generation
        if self._takes_images is None or self._takes_images[0] != generation:
            if (says := self._bridge.run(self._ask_takes_images())) is None:
                return True
            self._takes_images = generation, says
        return self._takes_images[1]

    async def _ask_takes_images(self) -> bool | None:
        try:
            return "image" in (await self._http.get("/v1/info", _HEALTH_SECONDS))["accepts"]
        except RetrieverUnavailable:
            return None
        except (RetrieverRefused, KeyError, TypeError):
            return False  # another project's, or older than images

    def query_style(self) -> str | None:
        """Read it in the server's /v1/info; None where it is not there, with a warning if it may be."""
        try:
            return self._bridge.run(self._http.get("/v1/info", _HEALTH_SECONDS)).get("query_style")
        except RetrieverRefused:
            return None  # another project's
        except RetrieverUnavailable as error:
            logger.warning("the style in which the retriever is to be asked is not known: %s", error)
            return None

    def search(self, queries: Sequence[Query], k: int, where: Filter | None = None) -> list[list[Hit]]:
        """Ask the server; raises a RetrieverError where it does not answer, at the latest at the deadline."""
        require(k >= 1, "k", k, ">= 1")
        http = self._http if where is None else self._http.filtered(where)
        asked = [with_image_bytes(query) for query in queries]
        outcomes = self._bridge.run(http.ask(asked, k)) if queries else []
        if failure := next((each for each in outcomes if isinstance(each, RetrieverError)), None):
            raise failure
        rankings = [list(outcome) for outcome in outcomes if not isinstance(outcome, RetrieverError)]
        self._last = next((hit.generation for ranking in rankings for hit in ranking), self._last)
        return [
            [hit if hit.generation else replace(hit, generation=self._unnamed) for hit in ranking]
            for ranking in rankings
        ]

    def probe(self) -> None:
        bridge = Bridge()
        try:
            bridge.run(self._http.probe())
        finally:
            bridge.close(self._http.close())

    def thumbnail(self, passage_id: str, side: int) -> bytes | None:
        try:
            return self._bridge.run(self._http.picture(Passage(passage_id, ""), side))
        except RetrieverRefused:
            return None

    def close(self) -> None:
        self._bridge.close(self._http.close())

    async def ask(self, queries: list[Query], k: int) -> Sequence[Outcome]:
        """As `Retriever.ask`, over connections of the caller's event loop."""
        return await self._http.ask(queries, k)

    async def picture(self, passage: Passage, side: int) -> bytes:
        return await self._http.picture(passage, side)

    async def document(self, passage_id: str) -> Passage | None:
        return await self._http.document(passage_id)

    async def leave(self) -> None:
        await self._http.close()
