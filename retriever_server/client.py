"""How the agent searches: one query at a time, over HTTP or in process, with the same manners.

Queries that trajectories ask at about the same time travel in one request, each different one once.
The world may fail: connections and 5xx are retried until the deadline has passed, then a typed
error is raised. An empty list means that nothing was found, never that something broke.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

from data.errors import (
    ConfigError,
    DataError,
    RetrieverError,
    RetrieverRefused,
    RetrieverTimeout,
    RetrieverUnavailable,
)
from data.records import Hit
from retriever_server.retriever import Retriever
from retriever_server.wire import RetrieveRequest, parse_hits, render_request

_log = logging.getLogger(__name__)

Outcome = list[Hit] | RetrieverError
_Parsed = TypeVar("_Parsed")

_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 0.1, 2.0
_REFUSES_THE_QUERIES = {400, 413, 422}
"""Other 4xx refuse the address or the caller: asking again with fewer queries is useless."""
_WORTH_A_RETRY = {408, 425, 429}


class Backend(Protocol):
    """Answers a batch of queries."""

    window_seconds: float
    """How long a batch stays open for queries to join it."""

    @property
    def waits(self) -> bool:
        """Whether it asks another machine, as `Retriever.waits`."""
        ...

    async def ask(self, queries: list[str], k: int) -> Sequence[Outcome]:
        """The hits of each query, or the error that this query alone met."""
        ...

    async def close(self) -> None:
        """Let go of what is open."""
        ...


class SearchClient:
    """Collects the queries of all trajectories into batches of at most `max_batch`; safe to share.

    One client serves any number of event loops, one after the other.
    """

    def __init__(self, backend: Backend, max_batch: int = 128) -> None:
        if max_batch < 1:
            raise ConfigError(f"max_batch = {max_batch}: must be >= 1")
        self._backend, self._max_batch = backend, max_batch
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopState] = WeakKeyDictionary()

    @property
    def waits(self) -> bool:
        """Whether a search asks another machine: what comes back, and when, is then not repeatable."""
        return self._backend.waits

    async def search(self, query: str, k: int) -> list[Hit]:
        """The best `k` hits, best first; raises a RetrieverError if nobody could answer."""
        if k < 1:
            raise ConfigError(f"k = {k}: must be >= 1")
        loop = asyncio.get_running_loop()
        state = self._loops.setdefault(loop, _LoopState())
        waiter: asyncio.Future[list[Hit]] = loop.create_future()
        if k not in state.open:
            state.open[k] = batch = {}
            if self._backend.window_seconds:
                loop.call_later(self._backend.window_seconds, self._send, state, batch, k)
            else:  # after every coroutine that is ready now has run
                loop.call_soon(self._send, state, batch, k)
        batch = state.open[k]
        batch.setdefault(query, []).append(waiter)
        if len(batch) >= self._max_batch:
            self._send(state, batch, k)
        return await waiter

    async def close(self) -> None:
        """Fail what still waits in this event loop, and close the connections."""
        state = self._loops.pop(asyncio.get_running_loop(), _LoopState())
        for k, batch in list(state.open.items()):
            self._send(state, batch, k)
        for task in state.tasks:
            task.cancel()
        await asyncio.gather(*state.tasks, return_exceptions=True)
        await self._backend.close()

    async def __aenter__(self) -> SearchClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _send(self, state: _LoopState, batch: _Batch, k: int) -> None:
        if state.open.get(k) is not batch:
            return  # it was full and has gone before its window ended
        del state.open[k]
        task = asyncio.get_running_loop().create_task(self._answer(batch, k))
        state.tasks.add(task)
        task.add_done_callback(state.tasks.discard)

    async def _answer(self, batch: _Batch, k: int) -> None:
        """Ask, and hand every waiter its hits or its error; one that was cancelled is left out."""
        outcomes: Sequence[Outcome] = []
        failure: RetrieverError = RetrieverUnavailable("the search client was closed")
        try:
            outcomes = await self._backend.ask(list(batch), k)
            failure = RetrieverError(f"{len(outcomes)} rows for {len(batch)} queries")
        except RetrieverError as error:
            failure = error
        except Exception as error:
            _log.exception("search failed")
            failure = RetrieverError(f"search failed: {type(error).__name__}: {error}")
        finally:
            if len(outcomes) != len(batch):
                outcomes = [failure] * len(batch)
            for waiters, outcome in zip(batch.values(), outcomes, strict=True):
                for waiter in waiters:
                    _settle(waiter, outcome)


_Batch = dict[str, list["asyncio.Future[list[Hit]]"]]
"""Each different query with those who wait for it."""


@dataclass
class _LoopState:
    open: dict[int, _Batch] = field(default_factory=dict)
    """k -> the batch that queries may still join."""
    tasks: set[asyncio.Task] = field(default_factory=set)


def _settle(waiter: asyncio.Future, outcome: Outcome) -> None:
    if waiter.done():
        return
    if isinstance(outcome, RetrieverError):
        # Its own exception object: a traceback grows with every `raise` of a shared one.
        waiter.set_exception(type(outcome)(*outcome.args))
    else:
        waiter.set_result(list(outcome))


class InProcess:
    """Searches a retriever of this process in the event loop's thread, without a window of time.

    So the order in which answers arrive depends on nothing but the order of the questions. One that
    itself waits for other machines is searched in a thread, so that the loop goes on meanwhile.
    """

    window_seconds = 0.0

    def __init__(self, retriever: Retriever) -> None:
        self.retriever = retriever

    @property
    def waits(self) -> bool:
        """What the retriever says."""
        return self.retriever.waits

    async def ask(self, queries: list[str], k: int) -> Sequence[Outcome]:
        """The hits of each query."""
        if self.waits:
            return await asyncio.to_thread(self.retriever.search, queries, k)
        return self.retriever.search(queries, k)

    async def close(self) -> None:
        """Nothing of this event loop's is open; the retriever is its owner's to close."""


class Http:
    """Asks a Search-R1 server; `deadline_seconds` bounds a request with all its retries."""

    waits = True

    def __init__(
        self,
        url: str,
        deadline_seconds: float = 30.0,
        window_seconds: float = 0.002,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if deadline_seconds <= 0:
            raise ConfigError(f"deadline_seconds = {deadline_seconds}: must be > 0")
        self.url, self.headers = _checked_url(url), headers
        self.deadline_seconds, self.window_seconds = deadline_seconds, window_seconds
        self._sessions: dict[asyncio.AbstractEventLoop, Any] = {}
        self._failing = False
        self._jitter = random.Random()  # its own: no draw here may shift a seeded run

    async def ask(self, queries: list[str], k: int) -> Sequence[Outcome]:
        """The hits of each query; a refused batch is halved until the bad query stands alone."""
        return await self._ask(queries, k, time.monotonic())

    async def _ask(self, queries: list[str], k: int, start: float) -> Sequence[Outcome]:
        try:
            return await self._ask_until_deadline(queries, k, start)
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

    async def _ask_until_deadline(self, queries: list[str], k: int, start: float) -> Sequence[Outcome]:
        attempt, last_failure = 0, None
        while True:
            left = self.deadline_seconds - (time.monotonic() - start)
            try:
                async with asyncio.timeout(left):
                    rankings = await self._ask_once(queries, k)
                self._note(None)
                return rankings
            except TimeoutError:
                raise self._too_late(start, attempt, last_failure) from last_failure
            except _TryAgain as failure:
                attempt, last_failure = attempt + 1, failure
                self._note(failure)
                delay = failure.after_seconds or self._delay(attempt)
                if time.monotonic() - start + delay >= self.deadline_seconds:
                    raise self._too_late(start, attempt, failure) from failure
            await asyncio.sleep(delay)

    def _note(self, failure: Exception | None) -> None:
        """Say once that the server fails, and once that it is back."""
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

    async def _ask_once(self, queries: list[str], k: int) -> list[list[Hit]]:
        body = render_request(RetrieveRequest(queries, k, return_scores=True))
        rankings = await self._post("/retrieve", body, parse_hits)
        if len(rankings) != len(queries):
            raise _TryAgain(f"{len(rankings)} rows for {len(queries)} queries")
        return rankings

    async def _post(self, path: str, body: Any, parse: Callable[[Any], _Parsed]) -> _Parsed:
        """What `parse` reads in the JSON answer to one request; a failure that may pass is a _TryAgain."""
        import httpx

        try:
            response = await self._session().post(self.url + path, json=body)
        except httpx.TransportError as error:
            raise _TryAgain(f"{type(error).__name__}: {error}") from error
        self._check_status(response)
        try:
            return parse(response.json())
        except (ValueError, DataError) as error:
            raise _TryAgain(f"malformed answer: {error}") from error

    def _check_status(self, response: Any) -> None:
        """Raise what the HTTP status means; a server's own reason goes into the message."""
        status = response.status_code
        if status == 200:
            return
        reason = f"{self.url}: answered {status}: {response.text[:200]}"
        if status >= 500 or status in _WORTH_A_RETRY:
            raise _TryAgain(reason, _seconds(response.headers.get("retry-after")))
        if status in _REFUSES_THE_QUERIES:
            raise _QueriesRefused(reason)
        raise RetrieverRefused(reason)

    def _delay(self, attempt: int) -> float:
        """Exponential with half of it at random, so that clients do not come back in step."""
        longest = min(_FIRST_DELAY_SECONDS * 2 ** (attempt - 1), _LONGEST_DELAY_SECONDS)
        return longest * self._jitter.uniform(0.5, 1.0)

    def _session(self) -> Any:
        import httpx

        loop = asyncio.get_running_loop()
        if loop not in self._sessions:
            for ended in [known for known in list(self._sessions) if known.is_closed()]:
                self._sessions.pop(ended, None)  # connections cannot outlive their loop
            # No proxy from the environment: nothing but the arguments decides where a query goes.
            self._sessions[loop] = httpx.AsyncClient(timeout=None, trust_env=False, headers=self.headers)
        return self._sessions[loop]


def connect(spec: str, deadline_seconds: float = 30.0) -> SearchClient:
    """A client for the URL of a server, or for anything else that `opening.open_retriever` opens here."""
    if spec.startswith(("http://", "https://")):
        return SearchClient(Http(spec, deadline_seconds))
    from retriever_server.opening import open_retriever

    return SearchClient(InProcess(open_retriever(spec, deadline_seconds)))


def _checked_url(url: str) -> str:
    """The address of the server, with or without the path `/retrieve` given."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(f"retriever {url!r}: must be like http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/retrieve")


class _TryAgain(Exception):
    """A failure that may pass. `after_seconds` if the server said when."""

    def __init__(self, reason: str, after_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.after_seconds = after_seconds


class _QueriesRefused(Exception):
    """The server refuses what is in this request."""


def _seconds(retry_after: str | None) -> float | None:
    """A Retry-After header in seconds; None if absent or a date."""
    return float(retry_after) if retry_after and retry_after.isdigit() else None
