"""The agent's search client: one query at a time, over HTTP or in process, with the same manners.

Queries that trajectories ask at about the same time travel in one request, each different one once. An empty
list means that nothing was found, never that something broke.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from data.corpus import Corpus
from data.errors import (
    DataError,
    RetrieverError,
    RetrieverRefused,
    RetrieverUnavailable,
    SleuthError,
    require,
)
from data.records import Hit, Item, Passage
from data.text import is_unicode
from retriever_server.client.wire import with_image_bytes
from retriever_server.retriever import Outcome, Query, Retriever

_log = logging.getLogger(__name__)


class SearchClient:
    """Collects the queries of all trajectories into batches of at most `max_batch`; safe to share.

    One client serves any number of event loops, one after the other.
    """

    def __init__(self, retriever: Retriever, max_batch: int = 128) -> None:
        require(max_batch >= 1, "max_batch", max_batch, ">= 1")
        self._retriever, self._max_batch = retriever, max_batch
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopState] = WeakKeyDictionary()

    @property
    def waits(self) -> bool:
        """Return whether a search asks another machine: what comes back, and when, is then not repeatable."""
        return self._retriever.waits

    @property
    def corpus(self) -> Corpus | None:
        """The corpus, where the retriever is in this process and has one."""
        return self._retriever.corpus

    def query_style(self) -> str | None:
        return self._retriever.query_style()

    async def search(self, query: Query, k: int) -> list[Hit]:
        """Return the best `k` hits, best first; raises a RetrieverError if nobody could answer.

        DataError naming the file for an image that is none, where it has to travel. A query that is not
        Unicode is refused alone, not with all that would travel with it.
        """
        if not is_unicode(text := query if isinstance(query, str) else query.text):
            raise RetrieverRefused(f"a query is not Unicode: half a surrogate pair in {text[:80]!r}")
        if isinstance(query, Item) and self.waits:
            query = await asyncio.to_thread(with_image_bytes, query)
        loop = asyncio.get_running_loop()
        state = self._loops.setdefault(loop, _LoopState())
        waiter: asyncio.Future[list[Hit]] = loop.create_future()
        batch = state.open.setdefault(k, {})
        if not batch:
            task = loop.create_task(self._answer(state, batch, k))
            state.tasks.add(task)
            task.add_done_callback(state.tasks.discard)
        batch.setdefault(query, []).append(waiter)
        if len(batch) >= self._max_batch:
            del state.open[k]  # the next query begins another
        return await waiter

    async def picture(self, passage: Passage, side: int = 1024) -> bytes:
        """Return a file of the image of a passage that was found, at most `side` pixels wide and high.

        Raises DataError if it has none that can be read, else a RetrieverError.
        """
        if not passage.image:
            raise DataError(f"passage {passage.id!r} has no image")
        return await self._retriever.picture(passage, side)

    async def document(self, passage_id: str) -> Passage | None:
        return await self._retriever.document(passage_id)

    async def probe(self) -> None:
        """Ask once whether searches will be answered; raises a RetrieverError, soon, where not."""
        try:
            await asyncio.to_thread(self._retriever.probe)
        finally:
            await self._retriever.leave()

    async def close(self) -> None:
        """Fail what still waits in this event loop, and close the connections."""
        state = self._loops.pop(asyncio.get_running_loop(), _LoopState())
        for task in state.tasks:
            task.cancel()
        await asyncio.gather(*state.tasks, return_exceptions=True)
        await self._retriever.leave()

    async def __aenter__(self) -> SearchClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _answer(self, state: _LoopState, batch: _Batch, k: int) -> None:
        """Ask when the batch's window ends, and hand every waiter its hits or its error.

        One that was cancelled is left out.
        """
        outcomes: Sequence[Outcome] = []
        failure: RetrieverError = RetrieverUnavailable("the search client was closed")
        try:
            # Without a window: after every coroutine that is ready now has run.
            await asyncio.sleep(self._retriever.window_seconds)
            if state.open.get(k) is batch:
                del state.open[k]
            outcomes = await self._retriever.ask(list(batch), k)
            failure = RetrieverError(f"{len(outcomes)} rows for {len(batch)} queries")
        except RetrieverError as error:
            failure = error
        except SleuthError as error:  # a query that cannot be searched: a broken image, an image to BM25
            failure = RetrieverError(str(error))
        except Exception as error:
            _log.exception("search failed")
            failure = RetrieverError(f"search failed: {type(error).__name__}: {error}")
        finally:
            if len(outcomes) != len(batch):
                outcomes = [failure] * len(batch)
            for waiters, outcome in zip(batch.values(), outcomes, strict=True):
                for waiter in waiters:
                    _settle(waiter, outcome)


_Batch = dict[Query, list["asyncio.Future[list[Hit]]"]]
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


def connect(spec: str, deadline_seconds: float = 30.0) -> SearchClient:
    """Open a client for the URL of a server, those of replicas, or whatever `open_retriever` opens."""
    from retriever_server.open_retriever import open_retriever

    return SearchClient(open_retriever(spec, deadline_seconds))
