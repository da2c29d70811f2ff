"""What the server does behind every front: checks, batches, keeps deadlines, lets go of clients that left."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request

from data.columns import wait_for_columns
from data.errors import ConfigError, DataError, RetrieverError
from data.records import Hit, Input, Item, Passage
from retriever_server.filters import parse_filter, prepare
from retriever_server.retriever import text_in
from retriever_server.server.batching import FAIL_ALIKE, Batcher, Batching
from retriever_server.server.documents import find_pages, is_url
from retriever_server.server.hot_swap import Live, Opened
from retriever_server.server.image_requests import Pictures, text_of
from retriever_server.server.metrics import Metrics
from retriever_server.server.pipeline import Staged
from retriever_server.server.schema import Pictured, Stage

_log = logging.getLogger(__name__)

Outcome = list[Hit] | Exception
DEADLINE_HEADER = "x-deadline-seconds"


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; more is answered with 4xx."""

    default_top_k: int = 3
    """Passages a query where the client says `topk: null`."""
    max_top_k: int = 100
    max_queries: int = 100_000
    max_hits: int = 300_000
    """In one answer: queries times passages a query."""
    max_query_chars: int = 8192
    max_body_bytes: int = 8 << 20
    max_deadline_seconds: int = 60
    """The longest that a request may take; then it gets 504."""
    max_images: int = 16
    """In one request."""
    max_image_bytes: int = 4 << 20
    """Of an image's file; in base64 it is a third longer."""
    max_image_pixels: int = 20_000_000
    """Width times height."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ConfigError(f"{name} = {value}: must be >= 1")
        if self.default_top_k > self.max_top_k:
            raise ConfigError(
                f"default_top_k = {self.default_top_k}: must be <= max_top_k = {self.max_top_k}"
            )


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Found:
    """The outcome of each query, and what answered."""

    outcomes: list[Outcome]
    backend: str
    generation: str
    stages: Sequence[Mapping[str, Any]]
    """What each stage was, as JSON."""
    linked: str | None
    """What links to pictures name: the backend, where it is not the default."""

    def rankings(self) -> list[list[Hit]]:
        """The hits of all queries; raises the first error that one of them met."""
        return [_hits_or_raise(outcome) for outcome in self.outcomes]


def _hits_or_raise(outcome: Outcome) -> list[Hit]:
    if isinstance(outcome, Exception):
        raise QueryFailed(outcome)
    return outcome


class WrongQuery(DataError):
    """This query of the request, and no other, cannot be searched."""


class QueryFailed(Exception):
    """A query of the request met this error; its text is for clients, and names no path."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error) if isinstance(error, WrongQuery) else f"search failed: {_reason(error)}")
        self.error = error


def _reason(error: Exception) -> str:
    if isinstance(error, DataError | ConfigError):
        return "the server cannot read its own data; its log says more"
    if isinstance(error, OSError):
        return f"{type(error).__name__}: {error.strerror or without_paths(str(error))}"
    return f"{type(error).__name__}: {without_paths(str(error))}"


def without_paths(text: str) -> str:
    """The text with "..." for each path.   "/srv/a.npy: gone" -> "...: gone"; http://h/a stays."""
    return _PLACES.sub(lambda found: found[0] if found[0].startswith("http") else "...", text)


_PLACES = re.compile(r"https?://\S+|(?:[\w.~%-]*/)+[\w.~%#=-]*")


class Service:
    """Backends by name (the first answers who names none), and the queue before them."""

    def __init__(
        self,
        backends: Mapping[str, Live],
        limits: Limits,
        batching: Batching,
        image_folders: Sequence[str | Path] = (),
    ) -> None:
        self.backends, self.limits, self.metrics = dict(backends), limits, Metrics()
        self.batcher = Batcher(batching, self.metrics)
        self.pictures = Pictures(
            limits.max_images, limits.max_image_bytes, limits.max_image_pixels, image_folders
        )
        self.stopping = False
        """Set when it is about to stop: new clients should go elsewhere."""
        self._told = False
        """Whether the log knows of a search that hangs."""
        for live in self.backends.values():
            live.on_swap = self.describe

    @property
    def unready(self) -> str:
        """Why no new client should come now; "" if it may."""
        if self.stopping:
            return "the server is stopping"
        waiting = self.batcher.waiting
        full = f"{waiting} queries are waiting" if waiting >= self.batcher.settings.max_waiting else ""
        return self.hanging or full

    @property
    def hanging(self) -> str:
        """Why it is not well: a search that does not end; "" if it is."""
        seconds = self.batcher.longest_seconds
        hangs = seconds > self.batcher.settings.hang_seconds
        return f"a search has been under way for {seconds:.0f} s" if hangs else ""

    def check_health(self) -> bool:
        """Whether it is well; tells the log when that changes."""
        if bool(reason := self.hanging) != self._told:
            self._told = bool(reason)
            _log.error("%s", reason or "no search hangs any more")
        return not reason

    @property
    def default(self) -> Live:
        """The backend that answers who names none."""
        return next(iter(self.backends.values()))

    async def search(
        self,
        queries: Sequence[str | Pictured],
        top_k: int | None,
        where: Mapping[str, Any] | None = None,
        backend: str | None = None,
        request: Request | None = None,
        deadline_seconds: float | None = None,
        stages: Sequence[Stage] | None = None,
    ) -> Found:
        """The outcome of every query, all by one generation; `stages` stand instead of a `backend`.

        Raises DataError for a wrong request, Overloaded, TimeoutError, ClientGone.
        """
        if stages and backend is not None:
            raise DataError("backend: with stages it is what `retrieve` names")
        stages = stages or [Stage(retrieve=self._backend(backend)[0])]
        k = self.limits.default_top_k if top_k is None else top_k
        self._check(queries, k, where)
        staged = Staged(stages, lambda name: self._backend(name)[1].current, k, self.limits.max_top_k)
        with staged:
            self._check_number(len(queries), staged.k[-1])
            searching = self._search(staged, queries, where)
            outcomes = await self.wait(searching, request, deadline_seconds)
            report = staged.report()
        name, k = str(stages[0].retrieve), staged.k[-1]
        linked = None if name == next(iter(self.backends)) else name
        found = Found(outcomes, name, report[-1]["generation"], report, linked)
        if request is not None:
            request.scope.get("facts", {}).update(
                queries=len(queries), top_k=k, backend=name, generation=found.generation
            )
        return found

    async def _search(
        self, staged: Staged, queries: Sequence[str | Pictured], where: Mapping[str, Any] | None
    ) -> list[Outcome]:
        pictured = any(isinstance(query, Pictured) and query.image is not None for query in queries)
        # Before anything is decoded.
        if pictured and not await asyncio.to_thread(staged.takes_images):
            raise DataError("queries: one holds an image, and what is asked reads text only")
        read = await self.pictures.read(queries, "queries")
        if where is not None:  # not in a thread that searches: others wait for it
            for corpus in staged.corpora():
                await prepare(corpus, where)
        asked = [query for query in read if _is_unicode(text_in(query))]
        # Texts do not wait for the images of others.
        key = (staged.key, json.dumps(where, sort_keys=True), pictured)
        found = await self.batcher.run(key, lambda items: staged.search(items, where), asked)
        for error in {str(outcome) for outcome in found if isinstance(outcome, FAIL_ALIKE)}:
            _log.error("search failed: %s", error)
        outcomes = (_judge(*each, staged.k[-1], where) for each in zip(asked, found, strict=True))
        return [next(outcomes) if _is_unicode(text_in(query)) else WrongQuery(_NO_UNICODE) for query in read]

    async def encode(self, opened: Opened, inputs: Sequence[str | Pictured], role: Any) -> list[Any]:
        """What the encoder inside makes of each input (one row of its vectors), or the exception it met."""
        encoder = opened.find("encoder")
        pictured = any(isinstance(each, Pictured) and each.image is not None for each in inputs)
        if pictured and "image" not in encoder.takes:
            raise DataError("inputs: one holds an image, and the encoder reads text only")
        asked = await self.pictures.read(inputs, "inputs")

        def work(items: list[Input]) -> list[Any]:
            with opened:
                vectors = encoder.encode(items, role)
            sparse = encoder.spec.kind == "sparse"
            return [vectors[[i]] if sparse else vectors[i] for i in range(len(items))]

        return await self.batcher.run((opened, "encode", role, pictured), work, asked)

    async def close(self) -> None:
        """Stop working; whoever still waits is told so."""
        await self.batcher.close()
        await self.pictures.batcher.close()

    async def wait(self, work: Any, request: Request | None, deadline_seconds: float | None = None) -> Any:
        """What `work` returns; cancelled at the deadline (TimeoutError) or when the client has gone."""
        try:
            seconds = min(_deadline(request, deadline_seconds), self.limits.max_deadline_seconds)
        except DataError:
            work.close()
            raise
        working = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(_disconnected(request)) if request else None
        waited_for: set[asyncio.Future[Any]] = {working, leaving} if leaving else {working}
        try:
            await asyncio.wait(waited_for, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            if leaving and leaving.done():
                raise ClientGone
            raise TimeoutError(f"no answer within {seconds:g} s")
        finally:
            for future in waited_for:
                future.cancel()

    async def fetch(self, places: Sequence[str]) -> list[Passage | None]:
        """The pages of the corpus with these ids or urls; None where there is none such.

        Raises DataError if the default backend has no corpus of its own.
        """
        with self.default.current as opened:
            if (corpus := opened.find("corpus")) is None:
                raise DataError("this retriever has no corpus of its own to read pages from")
            if any(map(is_url, places)):
                await wait_for_columns(corpus)
            try:
                return await asyncio.to_thread(find_pages, corpus, places)
            except (DataError, ConfigError) as error:  # a passage that is none any more
                raise QueryFailed(error) from error

    def describe(self) -> dict[str, Any]:
        """The backends as they describe themselves, noted for the metrics too.

        May ask other machines: call it in a thread.
        """
        described = {}
        for name, live in self.backends.items():
            opened = live.current
            about = opened.retriever.describe()
            accepts = ["text", "image"] if opened.retriever.takes_images() else ["text"]
            described[name] = {**about, "generation": opened.generation, "accepts": accepts}
            self.metrics.note_backend(name, opened.generation, about)
        return described

    def reload(self, name: str | None) -> bool:
        """Whether another generation answers now; for a thread. Raises what opening raises."""
        return self._backend(name)[1].reload()

    def _backend(self, name: str | None) -> tuple[str, Live]:
        name = next(iter(self.backends)) if name is None else name
        if name not in self.backends:
            raise DataError(f"backend {name!r}: must be one of {', '.join(self.backends)}")
        return name, self.backends[name]

    async def thumbnail(self, passage_id: str, side: int, backend: str | None) -> bytes | None:
        """A JPEG of the picture of a passage in a backend's corpus; None where there is none."""
        with self._backend(backend)[1].current as opened:
            return await self.pictures.thumbnail(opened, passage_id, side)

    def _check(self, queries: Sequence[str | Pictured], k: int, where: Mapping[str, Any] | None) -> None:
        limits, longest = self.limits, max((len(text_of(query)) for query in queries), default=0)
        if longest > limits.max_query_chars:
            raise DataError(f"queries: one of {longest} characters, at most {limits.max_query_chars} allowed")
        if not 1 <= k <= limits.max_top_k:
            raise DataError(f"topk = {k}: must be from 1 to {limits.max_top_k}")
        if where is not None:
            parse_filter(where)

    def _check_number(self, queries: int, k: int) -> None:
        if queries > self.limits.max_queries:
            raise DataError(f"queries: {queries}, at most {self.limits.max_queries} are allowed")
        if queries * k > self.limits.max_hits:
            allowed = f"at most {self.limits.max_hits} hits are allowed"
            raise DataError(f"queries: {queries} of {k} hits each, {allowed}")


def _judge(query: Input, outcome: Outcome, k: int, where: Mapping[str, Any] | None) -> Outcome:
    """What became of a query; an error where hits are none. Raises DataError for a filter of no use here."""
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


_NO_UNICODE = "not Unicode: half a surrogate pair"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_unicode(texts: Sequence[str]) -> None:
    """Raise DataError if one holds half a surrogate pair, which JSON can carry and no encoder reads."""
    if not all(map(_is_unicode, texts)):
        raise DataError(_NO_UNICODE)


def _deadline(request: Request | None, asked_seconds: float | None) -> float:
    """The body's wish, else the header's; DataError where that is no number of seconds."""
    header = request.headers.get(DEADLINE_HEADER) if request and asked_seconds is None else None
    try:
        seconds = float(header) if header is not None else asked_seconds
    except ValueError:
        seconds = -1.0
    if seconds is None:
        return float("inf")
    if not seconds > 0:
        raise DataError(f"{DEADLINE_HEADER}: must be a number of seconds > 0")
    return seconds


async def _disconnected(request: Request) -> None:
    """Return when the client has gone; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
