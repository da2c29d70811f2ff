"""Items of different requests, worked on together: a short window or a full batch, in worker threads.

Who waits is bounded (`Overloaded`); who fails, fails alone. Of a request of many items a few stand in the
queue at a time, so that others are served between them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from data.errors import (
    ConfigError,
    DataError,
    RetrieverError,
    RetrieverRefused,
    RetrieverTimeout,
    RetrieverUnavailable,
    SleuthError,
    require,
    require_range,
)
from data.records import Item

if TYPE_CHECKING:
    from retriever_server.server.metrics import Metrics

_log = logging.getLogger(__name__)

Work = Callable[[list[Any]], Sequence[Any]]
"""Items in, one result each, in their order; runs in a worker thread."""

FAIL_ALIKE = (ConfigError, DataError, RetrieverUnavailable, RetrieverTimeout)
"""Errors that no smaller batch of texts would avoid, and nobody has logged: a wrong filter, nobody there."""
_LONGEST_RETRY_SECONDS = 10


@dataclass(frozen=True)
class Batching:
    """Batching of the queries of different requests."""

    max_batch: int = 64
    """Queries in one search."""
    window_seconds: float = 0.002
    """A search waits for others as long as one more comes within this time (at most a fifth of a batch)."""
    threads: int = 1
    """Searches at the same time; more help where a search waits for another machine."""
    max_waiting: int = 4096
    """Queries that may stand in the queue; beyond it requests get 429 or 503."""
    hang_seconds: float = 30.0
    """Time that a search may take before `/readyz` says 503."""

    def __post_init__(self) -> None:
        require_range(self, "", "> 0", "hang_seconds")
        require_range(self, "", ">= 1", "max_batch", "threads", "max_waiting")
        require(0 <= self.window_seconds <= 1, "window_seconds", self.window_seconds, "from 0 to 1")


class Overloaded(Exception):
    """Too many items wait already; `retry_after_seconds` says when to come back."""

    def __init__(self, reason: str, retry_after_seconds: int) -> None:
        super().__init__(f"{reason}; try again in {retry_after_seconds} s")
        self.retry_after_seconds = retry_after_seconds


_QUEUED_OF_ONE = 128
"""The most items of one request in the queue, or two batches if that is more."""
_WAITED_SHARE = 0.2
"""A share of the time of a batch: clients that were answered together come back together, but not at once."""


class Batcher:
    """Puts items with the same key into batches. For one event loop at a time."""

    def __init__(self, settings: Batching, metrics: Metrics | None = None) -> None:
        self.settings, self._metrics = settings, metrics
        self.waiting = 0
        """Items that are not yet being worked on."""
        self._groups: dict[Hashable, deque[_Entry]] = {}
        """Key -> its items; the key that has waited longest comes first."""
        self._begun: dict[int, float] = {}
        """Time at which each batch that is worked on was begun."""
        self._seconds_per_item = self._seconds_per_batch = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self, key: Hashable, work: Work, items: Sequence[Hashable]) -> list[Any]:
        """Return the result of each item, or the exception that it met.

        Items of one `key` may be worked on together, by the `work` of any of them. Raises Overloaded.
        Being cancelled takes those out that still wait.
        """
        if not items:
            return []
        at_once = min(len(items), max(_QUEUED_OF_ONE, 2 * self.settings.max_batch))
        if self.waiting + at_once > self.settings.max_waiting and self.waiting:
            raise Overloaded(f"{self.waiting} queries are waiting", self._retry_after())
        self._start()
        job = _Job(work, items, asyncio.get_running_loop().create_future())
        self._enqueue(self._groups.setdefault(key, deque()), job, at_once)
        self._arrived.set()
        if self.waiting >= self.settings.max_batch:
            self._full.set()
        try:
            return await job.future
        finally:  # nothing of it is left to take, unless it was cancelled
            self.waiting -= job.queued
            job.queued = 0

    @property
    def longest_seconds(self) -> float:
        """Seconds since the oldest batch was begun."""
        return time.perf_counter() - min(self._begun.values()) if self._begun else 0.0

    async def close(self) -> None:
        """Stop working; whoever still waits is told so."""
        if self._loop is not asyncio.get_running_loop():
            return
        self._loop = None
        for task in self._workers:
            task.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        self._pool.shutdown(wait=False)
        for entry in (entry for group in self._groups.values() for entry in group):
            entry.job.give_up(RetrieverUnavailable("the server is stopping"))
        self._groups.clear()

    def _enqueue(self, group: deque[_Entry], job: _Job, count: int) -> None:
        """Put the next `count` items of a request, or all that are left, at the end of the queue."""
        more = list(islice(job.entries, count))
        group.extend(more)
        job.queued += len(more)
        self.waiting += len(more)

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        self._loop, self._groups, self._begun, self.waiting = loop, {}, {}, 0
        self._arrived, self._full = asyncio.Event(), asyncio.Event()
        self._pool = ThreadPoolExecutor(self.settings.threads, "search")
        self._workers = [loop.create_task(self._serve()) for _ in range(self.settings.threads)]

    async def _serve(self) -> None:
        while True:
            if not self._groups:
                self._arrived.clear()
                await self._arrived.wait()
            await self._wait_for_others()
            if batch := self._take():
                try:
                    await self._work_on(batch)
                except Exception:
                    _log.exception("a batch was given up")

    async def _wait_for_others(self) -> None:
        """Wait until the batch is full, nobody came for `window_seconds`, or a share of its time is over."""
        window = self.settings.window_seconds
        end = time.perf_counter() + max(window, _WAITED_SHARE * self._seconds_per_batch)
        self._full.clear()
        waiting = 0
        while window and waiting < self.waiting < self.settings.max_batch and time.perf_counter() < end:
            waiting = self.waiting
            try:
                async with asyncio.timeout(window):
                    await self._full.wait()
            except TimeoutError:
                pass

    def _take(self) -> list[_Entry]:
        """Return the next batch: the oldest wanted items of the key that has waited longest."""
        if not self._groups:
            return []
        key = next(iter(self._groups))
        group, batch = self._groups.pop(key), []
        while group and len(batch) < self.settings.max_batch:
            entry = group.popleft()
            if not entry.job.future.done():
                entry.job.queued -= 1
                self.waiting -= 1
                batch.append(entry)
                self._enqueue(group, entry.job, 1)
        if group:
            self._groups[key] = group  # behind the others
        return batch

    async def _work_on(self, batch: list[_Entry]) -> None:
        items = list(dict.fromkeys(entry.item for entry in batch))
        start = self._begun[id(batch)] = time.perf_counter()
        outcomes: list[Any] = [RetrieverUnavailable("the server is stopping")] * len(items)
        try:
            running = asyncio.get_running_loop()
            outcomes = await running.run_in_executor(self._pool, run_isolated, batch[0].job.work, items)
        finally:
            self._begun.pop(id(batch), None)
            found = dict(zip(items, outcomes, strict=True))
            for entry in batch:
                entry.job.settle(entry.position, found[entry.item])
        seconds = time.perf_counter() - start
        self._seconds_per_item += 0.2 * (seconds / len(items) - self._seconds_per_item)
        self._seconds_per_batch += 0.2 * (seconds - self._seconds_per_batch)
        if self._metrics:
            failed = sum(isinstance(outcome, Exception) for outcome in outcomes)
            self._metrics.note_batch(len(items), failed, seconds, self.waiting)

    def _retry_after(self) -> int:
        expected = self.waiting * self._seconds_per_item / self.settings.threads
        return min(max(1, math.ceil(expected)), _LONGEST_RETRY_SECONDS)


def run_isolated(work: Work, items: list[Any]) -> list[Any]:
    """Return the result or exception of each item: a failed batch is halved until the bad one is alone."""
    try:
        results = list(work(items))
        if len(results) != len(items):
            raise RetrieverError(f"{len(results)} results for {len(items)} items")
        return results
    except Exception as error:
        # An image may be at fault alone where a text is not.
        pictured = isinstance(error, DataError) and any(isinstance(item, Item) for item in items)
        if isinstance(error, FAIL_ALIKE) and not (pictured and len(items) > 1):
            return [error] * len(items)
        if len(items) == 1:
            if not isinstance(error, RetrieverRefused):
                asked, unforeseen = getattr(items[0], "text", items[0]), not isinstance(error, SleuthError)
                _log.error("failed: %.200r: %s", asked, error, exc_info=unforeseen)
            return [error]
    half = len(items) // 2
    return run_isolated(work, items[:half]) + run_isolated(work, items[half:])


class _Job:
    """The items of one request."""

    def __init__(self, work: Work, items: Sequence[Hashable], future: asyncio.Future[list[Any]]) -> None:
        self.work, self.future = work, future
        self.entries = (_Entry(self, i, item) for i, item in enumerate(items))
        """Those that have not been in the queue."""
        self.queued = 0
        self._outcomes: list[Any] = [None] * len(items)
        self._missing = len(items)

    def settle(self, position: int, outcome: Any) -> None:
        self._outcomes[position] = outcome
        self._missing -= 1
        if not self._missing and not self.future.done():
            self.future.set_result(self._outcomes)

    def give_up(self, error: Exception) -> None:
        """Settle all items that have no outcome with this error."""
        if not self.future.done():
            self.future.set_result([error if each is None else each for each in self._outcomes])


@dataclass(frozen=True, slots=True)
class _Entry:
    job: _Job
    position: int
    item: Any
