"""A server over HTTP, as a client sees it: deadline, retries, typed errors; one answer or error a query.

Several servers of one index stand as one (`Replicas`): the least busy is asked, and what one cannot answer
another does. One that answers garbage, or not within its share of the deadline, has failed too. All should
serve the same generation: every hit names its own.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Self, TypeVar

from data.errors import (
    DataError,
    RetrieverError,
    RetrieverRefused,
    RetrieverTimeout,
    RetrieverUnavailable,
    require,
)
from data.machine.listening import PROBE_SECONDS
from data.records import Passage
from retriever_server.client.pool import ServerPool, servers_at
from retriever_server.client.retries import (
    TryAgain,
    certificates,
    checked_url,
    delay_seconds,
    may_pass,
    retry_after,
)
from retriever_server.client.wire import parse_hits, parse_results, render_search, thumbnail_link
from retriever_server.retriever import Filter, Outcome, Query

_log = logging.getLogger(__name__)

_Parsed = TypeVar("_Parsed")

PROBE_QUERY = "a"
_REFUSES_THE_QUERIES = {400, 413, 422}
"""Other 4xx refuse the address or the caller: asking again with fewer queries is useless."""
_MOST_QUERIES, _MOST_HITS = 512, 20_000
"""Queries in one request: more go in several, one after the other."""
_MAX_REPLY_BYTES = 64 << 20


class Http:
    """Asks a Search-R1 server; `deadline_seconds` bounds a request with all its retries.

    Images, and a filter `where`, travel by our own `/v1/search`.
    """

    window_seconds = 0.002
    patience_seconds = float("inf")
    """Time for which what fails is asked again, within the deadline."""
    where: Filter | None = None

    def __init__(
        self, url: str, deadline_seconds: float = 30.0, headers: Mapping[str, str] | None = None
    ) -> None:
        require(deadline_seconds > 0, "deadline_seconds", deadline_seconds, "> 0")
        checked = checked_url(url, f"retriever {url!r}", "must be like http://127.0.0.1:8000")
        self.url = checked.removesuffix("/retrieve")
        self.headers, self.deadline_seconds = headers, deadline_seconds
        self._sessions: dict[asyncio.AbstractEventLoop, Any] = {}
        self._failing = False

    async def ask(self, queries: list[Query], k: int) -> Sequence[Outcome]:
        """Return the hits of each query; a refused batch is halved until the bad query stands alone."""
        start, size = time.monotonic(), max(1, min(_MOST_QUERIES, _MOST_HITS // k))
        parts = [queries[i : i + size] for i in range(0, len(queries), size)]
        return [outcome for part in parts for outcome in await self._ask(part, k, start)]

    async def probe(self) -> None:
        """Raise a RetrieverError, within seconds, where nobody listens or what answers ranks no passages.

        An answer that is slow is waited for until the deadline.
        """
        hurried = copy.copy(self)
        hurried.patience_seconds = min(self.patience_seconds, PROBE_SECONDS)
        [outcome] = await hurried.ask([PROBE_QUERY], 1)
        if isinstance(outcome, RetrieverError):
            raise outcome

    async def picture(self, passage: Passage, side: int) -> bytes:
        """Ask once for the image, of the server that is asked for hits alone."""
        path = thumbnail_link(passage)
        kind, content = await self._get_within(path, self.deadline_seconds, params={"side": side})
        if not kind.startswith("image/"):
            raise RetrieverUnavailable(f"{self.url}{path}: answered with {kind or 'no type'}, no image")
        return content

    async def document(self, passage_id: str) -> Passage | None:
        """Return the whole document of a passage, by our server's `/access`; None where there is none."""

        def parse(answer: Any) -> Passage | None:
            from data.formats.rows import parse_passage

            try:
                [page] = answer["result"]
                return page and parse_passage({"id": passage_id, "contents": page["contents"]})
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"no answer of /access ({error!r})") from error

        body = {"urls": [passage_id], "whole": True}
        try:
            return await self._until_deadline(lambda: self._post("/access", body, parse), time.monotonic())
        except _QueriesRefused as refusal:
            raise RetrieverRefused(*refusal.args) from refusal

    async def get(self, path: str, seconds: float) -> Any:
        """Return the JSON object in the answer to a GET; raises RetrieverRefused, or RetrieverUnavailable."""
        kind, content = await self._get_within(path, seconds)
        try:
            if isinstance(answer := _parse_json(kind, content), dict):
                return answer
            raise DataError("no JSON object")
        except DataError as error:
            raise RetrieverUnavailable(f"{self.url}{path}: malformed answer: {error}") from error

    async def _get_within(self, path: str, seconds: float, **options: Any) -> tuple[str, bytes]:
        """Return the type and the bytes of the answer to a GET that is sent once."""
        try:
            async with asyncio.timeout(seconds):
                return await self._exchange("GET", path, **options)
        except (TryAgain, TimeoutError) as error:
            reason = str(error) or f"no answer within {seconds:g} s"
            raise RetrieverUnavailable(f"{self.url}{path}: {reason}") from error
        except _QueriesRefused as error:
            raise RetrieverRefused(*error.args) from error

    def filtered(self, where: Filter) -> Self:
        """Return the same server and connections, asked for what matches alone."""
        found = copy.copy(self)
        found.where = where
        return found

    async def _ask(self, queries: list[Query], k: int, start: float) -> Sequence[Outcome]:
        try:
            return await self._until_deadline(lambda: self._ask_once(queries, k), start, len(queries) > 1)
        except _QueriesRefused as refusal:
            if len(queries) == 1:
                return [RetrieverRefused(*refusal.args)]
        half = len(queries) // 2
        halves = (queries[:half], queries[half:])
        left, right = await asyncio.gather(*(self._ask(part, k, start) for part in halves))
        return [*left, *right]

    async def close(self) -> None:
        """Close the connections of this event loop."""
        session = self._sessions.pop(asyncio.get_running_loop(), None)
        if session is not None:
            await session.aclose()

    async def _until_deadline(
        self, send: Callable[[], Awaitable[_Parsed]], start: float, several: bool = False
    ) -> _Parsed:
        """Return what `send` gives, tried until the deadline; several: a request that might be halved."""
        attempt, last_failure = 0, None
        while True:
            left = self.deadline_seconds - (time.monotonic() - start)
            try:
                async with asyncio.timeout(left):
                    answer = await send()
                self._note(None)
                return answer
            except TimeoutError:
                raise self._too_late(start, attempt, last_failure) from last_failure
            except TryAgain as failure:
                if isinstance(failure, _TooLong) and several:
                    raise _QueriesRefused(str(failure)) from failure  # fewer may fit
                attempt, last_failure = attempt + 1, failure
                delay = failure.after_seconds or delay_seconds(attempt)
                if time.monotonic() - start + delay >= min(self.deadline_seconds, self.patience_seconds):
                    raise self._too_late(start, attempt, failure) from failure
                self._note(failure)
            await asyncio.sleep(delay)

    def _note(self, failure: Exception | None) -> None:
        """Say once that the server fails, and once that it is back."""
        if self.patience_seconds < self.deadline_seconds:  # who asks is told soon
            return
        if failure is not None and not self._failing:
            _log.warning("%s: %s; asking again for up to %.3g s", self.url, failure, self.deadline_seconds)
        elif failure is None and self._failing:
            _log.warning("%s: answers again", self.url)
        self._failing = failure is not None

    def _too_late(self, start: float, attempts: int, last_failure: Exception | None) -> RetrieverError:
        elapsed = time.monotonic() - start
        if last_failure is None:
            return RetrieverTimeout(f"{self.url}: no answer within {elapsed:.1f} s")
        return RetrieverUnavailable(
            f"{self.url}: gave up after {elapsed:.1f} s, {attempts} attempts ({last_failure})"
        )

    async def _ask_once(self, queries: list[Query], k: int) -> Sequence[Outcome]:
        texts = [query for query in queries if isinstance(query, str)]
        if self.where is not None or len(texts) < len(queries):
            body = render_search(queries, k, self.where)
            rankings = await self._post("/v1/search", body, lambda answer: parse_results(answer, self.url))
        else:
            body = {"queries": texts, "topk": k, "return_scores": True}
            rankings = await self._post("/retrieve", body, lambda answer: parse_hits(answer, self.url))
        if len(rankings) != len(queries):
            raise TryAgain(f"{len(rankings)} rows for {len(queries)} queries")
        if (most := max((len(row) for row in rankings if isinstance(row, list)), default=0)) > k:
            raise TryAgain(f"{most} hits of a query that asked for {k}")
        return rankings

    async def _post(self, path: str, body: Any, parse: Callable[[Any], _Parsed]) -> _Parsed:
        """Parse the JSON answer to one request; a failure that may pass is a TryAgain."""
        try:
            return parse(_parse_json(*await self._exchange("POST", path, json=body)))
        except UnicodeEncodeError as error:
            raise _QueriesRefused("a query is not Unicode: half a surrogate pair") from error
        except DataError as error:
            raise TryAgain(f"malformed answer: {error}") from error

    async def _exchange(self, method: str, path: str, **options: Any) -> tuple[str, bytes]:
        """Return the type and the bytes of an answer with status 200; reads no more than is sound."""
        import httpx

        content = bytearray()
        try:
            async with self._session().stream(method, self.url + path, **options) as response:
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > _MAX_REPLY_BYTES:
                        raise _TooLong(f"an answer of more than {_MAX_REPLY_BYTES:,} bytes")
        except httpx.HTTPError as error:  # a broken connection, or a body that cannot be unpacked
            raise TryAgain(f"{type(error).__name__}: {error}") from error
        self._check_status(response, content[:200].decode("utf-8", "replace"))
        return response.headers.get("content-type", ""), bytes(content)

    def _check_status(self, response: Any, body: str) -> None:
        """Raise what the HTTP status means; a server's own reason goes into the message."""
        status = response.status_code
        if status == 200:
            return
        reason = f"{self.url}: answered {status}: {body}"
        if may_pass(status) or status < 300:
            raise TryAgain(reason, retry_after(response.headers))
        if status in _REFUSES_THE_QUERIES:
            raise _QueriesRefused(reason)
        raise RetrieverRefused(reason)

    def _session(self) -> Any:
        import httpx

        loop = asyncio.get_running_loop()
        if loop not in self._sessions:
            for ended in [known for known in list(self._sessions) if known.is_closed()]:
                self._sessions.pop(ended, None)  # connections cannot outlive their loop
            # No proxy from the environment: nothing but the arguments decides where a query goes.
            self._sessions[loop] = httpx.AsyncClient(
                timeout=None, trust_env=False, headers=self.headers, verify=certificates()
            )
        return self._sessions[loop]


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
        """Probe all at once, as `Http.probe`: raises where none of them answers."""
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

    async def _with_any(self, act: Callable[[Http], Awaitable[_Parsed]]) -> _Parsed:
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


class _TooLong(TryAgain):
    """The answer does not end."""


class _QueriesRefused(Exception):
    """The server refuses what is in this request."""


def _parse_json(kind: str, content: bytes) -> Any:
    """Return the JSON in an answer of this content type; DataError where there is none."""
    if kind and "json" not in kind.lower():
        raise DataError(f"of type {kind[:60]!r}, not JSON")
    try:
        return json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(str(error)) from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
