"""Searches of a server: checked, batched with those of others, given up when nobody waits for them."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from data.columns import wait_for_columns
from data.errors import ConfigError, DataError, RetrieverError
from data.records import Hit, Input, Item, Passage
from data.text import is_unicode
from retriever_server.filters import find_documents, is_url, parse_filter, prepare
from retriever_server.retriever import corpora_in
from retriever_server.server.backends import HotSwappable, SearchPipeline, backend_of
from retriever_server.server.batching import FAIL_ALIKE, Batcher, Batching
from retriever_server.server.config import Limits
from retriever_server.server.errors import ClientGone, QueryFailed, WrongQuery, without_paths
from retriever_server.server.image_requests import ImageReader
from retriever_server.server.metrics import Metrics
from retriever_server.server.schema import NO_UNICODE, ImageInput, SearchOptions, Stage, texts_of

_log = logging.getLogger(__name__)

Outcome = list[Hit] | Exception
T = TypeVar("T")
_DEADLINE_HEADER = "x-deadline-seconds"


@dataclass(frozen=True)
class Found:
    """The outcome of each query, and what answered."""

    outcomes: list[Outcome]
    backend: str
    generation: str
    k: int
    stages: list[tuple[int, str]]
    """Hits that each stage gives at most, and their generation."""
    linked: str | None
    """The backend in links to pictures; None for the default."""


class SearchService:
    """Backends by name, of which the first is the default, and the queue before them."""

    def __init__(
        self,
        backends: Mapping[str, HotSwappable],
        limits: Limits,
        batching: Batching,
        image_folders: Sequence[str | Path] = (),
        dialect: str = "rllm",
        about: Mapping[str, Any] | None = None,
        on_reload: Callable[[], None] = lambda: None,
    ) -> None:
        """about: joins what `/v1/info` tells; on_reload: called after `/admin/reload` has swapped."""
        self.backends, self.limits, self.metrics = dict(backends), limits, Metrics()
        self.dialect, self.about, self.on_reload = dialect, dict(about or {}), on_reload
        self.batcher = Batcher(batching, self.metrics)
        self.images = ImageReader(limits, image_folders)
        self.stopping = False
        """Set when it is about to stop: new clients should go elsewhere."""
        self._hang_logged = False
        """Set while the log knows of a search that hangs."""
        for backend in self.backends.values():
            backend.on_swap = self.describe

    @property
    def unready(self) -> str:
        """The reason why no new client should come now, or ""."""
        if self.stopping:
            return "the server is stopping"
        waiting = self.batcher.waiting
        full = f"{waiting} queries are waiting" if waiting >= self.batcher.settings.max_waiting else ""
        return self.hanging or full

    @property
    def hanging(self) -> str:
        """The report of a search that hangs, or ""."""
        seconds = self.batcher.longest_seconds
        hangs = seconds > self.batcher.settings.hang_seconds
        return f"a search has been under way for {seconds:.0f} s" if hangs else ""

    def check_health(self) -> bool:
        """Return whether no search hangs; tell the log when that changes."""
        if bool(reason := self.hanging) != self._hang_logged:
            self._hang_logged = bool(reason)
            _log.error("%s", reason or "no search hangs any more")
        return not reason

    def backend(self, name: str | None = None) -> HotSwappable:
        """Return the backend of this name, the default without one; DataError where there is none."""
        return backend_of(self.backends, name)

    async def search(
        self,
        queries: Sequence[str | ImageInput],
        top_k: int | None,
        where: Mapping[str, Any] | None = None,
        backend: str | None = None,
        stages: Sequence[Stage] | None = None,
    ) -> Found:
        """Return the outcome of every query, all by one generation; `stages` stand instead of a `backend`.

        Raises DataError for a wrong request, Overloaded.
        """
        if stages and backend is not None:
            raise DataError("backend: not beside stages, whose `retrieve` names it")
        default = next(iter(self.backends))
        stages = stages or [Stage(retrieve=default if backend is None else backend)]
        k = self.limits.topk if top_k is None else top_k
        texts = texts_of(queries)
        self._check(texts, k, where)
        with SearchPipeline(stages, self.backends, k, self.limits.max_topk) as pipeline:
            self._check_number(len(queries), pipeline.k[-1])
            outcomes = await self._search(pipeline, queries, texts, where)
        name = str(stages[0].retrieve)
        found = list(zip(pipeline.k, pipeline.generations, strict=True))
        k, generation = found[-1]
        return Found(outcomes, name, generation, k, found, None if name == default else name)

    async def _search(
        self,
        pipeline: SearchPipeline,
        queries: Sequence[str | ImageInput],
        texts: Sequence[str],
        where: Mapping[str, Any] | None,
    ) -> list[Outcome]:
        pictured = any(isinstance(query, ImageInput) and query.image is not None for query in queries)
        # Before anything is decoded.
        if pictured and not await asyncio.to_thread(pipeline.takes_images):
            raise DataError("queries: one holds an image, and what is asked reads text only")
        read = await self.images.read(queries, "queries") if pictured else texts
        if where is not None:  # not in a thread that searches: others wait for it
            for corpus in pipeline.corpora():
                await prepare(corpus, where)
        whole = [is_unicode(text) for text in texts]
        asked = [query for query, fits in zip(read, whole, strict=True) if fits]
        # Texts do not wait for the images of others.
        key = (pipeline.key, json.dumps(where, sort_keys=True), pictured)
        found = await self.batcher.run(key, functools.partial(pipeline.search, where=where), asked)
        for error in {str(outcome) for outcome in found if isinstance(outcome, FAIL_ALIKE)}:
            _log.error("search failed: %s", error)
        outcomes = (_judge(*each, pipeline.k[-1], where) for each in zip(asked, found, strict=True))
        return [next(outcomes) if fits else WrongQuery(NO_UNICODE) for fits in whole]

    def _check(self, texts: Sequence[str], k: int, where: Mapping[str, Any] | None) -> None:
        limits, longest = self.limits, max(map(len, texts), default=0)
        if longest > limits.max_query_chars:
            raise DataError(f"queries: one of {longest} characters, at most {limits.max_query_chars} allowed")
        self.check_top_k(k)
        if where is not None:
            parse_filter(where)

    def check_top_k(self, k: int, name: str = "top_k") -> None:
        """Raise DataError for a number of passages that is not allowed; name: what the client calls it."""
        if not 1 <= k <= self.limits.max_topk:
            raise DataError(f"{name} = {k}: must be from 1 to {self.limits.max_topk}")

    def _check_number(self, queries: int, k: int) -> None:
        if queries > self.limits.max_queries:
            raise DataError(f"queries: {queries}, at most {self.limits.max_queries} are allowed")
        if queries * k > self.limits.max_hits:
            allowed = f"at most {self.limits.max_hits} hits are allowed"
            raise DataError(f"queries: {queries} of {k} hits each, {allowed}")

    async def fetch(self, places: Sequence[str], whole: bool = False) -> list[Passage | None]:
        """Return the documents of the corpus with these ids or urls; None where there is none such.

        whole: for an id, the document that the passage is from.

        Raises DataError if the default backend has no corpus of its own.
        """
        with self.backend().current as lease:
            if not (corpora := corpora_in(lease.retriever)):
                raise DataError("this retriever has no corpus of its own to read pages from")
            found: dict[str, Passage | None] = dict.fromkeys(places)
            try:
                for corpus in corpora:
                    missing = [place for place, page in found.items() if page is None]
                    if not whole and any(map(is_url, missing)):
                        await wait_for_columns(corpus)
                    pages = await asyncio.to_thread(find_documents, corpus, missing, whole)
                    found |= zip(missing, pages, strict=True)
                return [found[place] for place in places]
            except (DataError, ConfigError) as error:  # a passage that is none any more
                raise QueryFailed(error) from error

    def describe(self) -> dict[str, Any]:
        """Return what the backends say of themselves, and note it for the metrics.

        May ask other machines: call it in a thread.
        """
        described = {}
        for name, backend in self.backends.items():
            lease = backend.current
            about = lease.retriever.describe()
            accepts = ["text", "image"] if lease.retriever.takes_images() else ["text"]
            known = {"accepts": accepts, "query_style": lease.retriever.query_style()}
            described[name] = {**about, "generation": lease.generation, **known}
            self.metrics.note_backend(name, lease.generation, about)
        return described

    async def close(self) -> None:
        """Stop working; whoever still waits is told so."""
        await self.batcher.close()
        await self.images.batcher.close()


class Caller:
    """The client of a request: how long it waits for its answer, and whether it still does."""

    def __init__(
        self, service: SearchService, request: Request | None = None, deadline_seconds: float = math.inf
    ) -> None:
        """request: its body must have been read. deadline_seconds: where the body names none."""
        self.service, self._request, self._deadline_seconds = service, request, deadline_seconds

    async def rank(
        self, queries: Sequence[str], top_k: int | None, options: SearchOptions | None = None
    ) -> tuple[list[list[Hit]], Found]:
        """Search for hits of all queries; raises also QueryFailed, for the first that has none."""
        found = await self.search(queries, top_k, options)
        for outcome in found.outcomes:
            if isinstance(outcome, Exception):
                raise QueryFailed(outcome)
        return found.outcomes, found  # type: ignore[return-value]

    async def search(
        self,
        queries: Sequence[str | ImageInput],
        top_k: int | None,
        options: SearchOptions | None = None,
        stages: Sequence[Stage] | None = None,
    ) -> Found:
        """Search; raises DataError for a wrong request, Overloaded, TimeoutError, ClientGone."""
        options = options or SearchOptions.model_construct()
        searching = self.service.search(queries, top_k, options.where, options.backend, stages)
        found = await self.wait(searching, options.deadline_seconds)
        if self._request is not None:
            noted = {"queries": len(queries), "top_k": found.k}
            noted |= {"backend": found.backend, "generation": found.generation}
            self._request.scope.get("facts", {}).update(noted)
        return found

    async def wait(self, work: Coroutine[Any, Any, T], deadline_seconds: float | None = None) -> T:
        """Return what `work` returns; it is cancelled at the deadline, or when the client has gone."""
        asked = self._deadline_seconds if deadline_seconds is None else deadline_seconds
        seconds = min(asked, self.service.limits.max_deadline_seconds)
        patience = asyncio.timeout(seconds)
        # The next message of a client says that it has gone.
        leaving = asyncio.ensure_future(self._request.receive()) if self._request else None

        def give_up(_: Any) -> None:
            with suppress(RuntimeError):  # done in the same moment
                patience.reschedule(0)

        try:
            async with patience:
                if leaving:
                    leaving.add_done_callback(give_up)
                return await work
        except TimeoutError:
            if not patience.expired():
                raise
            if leaving and leaving.done():
                raise ClientGone from None
            raise TimeoutError(f"no answer within {seconds:g} s") from None
        finally:
            if leaving:
                leaving.remove_done_callback(give_up)
                leaving.cancel()


def _judge(query: Input, outcome: Outcome, k: int, where: Mapping[str, Any] | None) -> Outcome:
    """Return hits, or the error of a query; raises DataError for a filter of no use here."""
    if isinstance(outcome, ConfigError) and where is not None:
        raise DataError(str(outcome)) from outcome
    if isinstance(outcome, DataError) and isinstance(query, Item):
        return WrongQuery(without_paths(str(outcome)))
    if isinstance(outcome, Exception):
        return outcome
    if len(outcome) > k:
        return RetrieverError(f"{len(outcome)} hits where {k} were asked for")
    if not all(hit.passage.id and math.isfinite(hit.score) for hit in outcome):
        return RetrieverError("a hit without an id, or whose score is NaN or infinite")
    return outcome


def _seconds_in(header: str | None) -> float:
    """Return the deadline in a header, infinity without one; DataError where it is none."""
    try:
        seconds = math.inf if header is None else float(header)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise DataError(f"{_DEADLINE_HEADER}: must be a number of seconds > 0")
    return seconds


async def get_service(request: Request) -> SearchService:
    """Return the service of the application."""
    return request.app.state.service


async def get_caller(request: Request) -> Caller:
    """Return the client of this request."""
    await request.body()
    return Caller(request.app.state.service, request, _seconds_in(request.headers.get(_DEADLINE_HEADER)))


ServiceOf = Annotated[SearchService, Depends(get_service)]
CallerOf = Annotated[Caller, Depends(get_caller)]
