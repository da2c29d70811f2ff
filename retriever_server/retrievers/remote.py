"""Retrievers at the other end of a connection: a Sleuth or Search-R1 server (`Remote`), a web search (`Web`).

They speak through the client's own HTTP (deadline, retries, typed errors), from threads: one event
loop in a thread of its own holds the connections.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data.errors import ConfigError, DataError, RetrieverError, RetrieverRefused, RetrieverUnavailable
from data.jsonl import read_json, write_json
from data.listening import why_silent
from data.records import Hit, Passage
from retriever_server.client.http import Http
from retriever_server.client.replicas import Replicas, open_http
from retriever_server.client.wire import carried
from retriever_server.retriever import Filter, Query, Retriever, texts_of

_STALE_SECONDS = 1.0
"""How long a server's generation is believed."""
_HEALTH_SECONDS = 2.0


class _FromThreads:
    """An Http backend for callers that have no event loop."""

    def __init__(self, http: Http | Replicas) -> None:
        self._http, self._loop = http, asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def ask(self, http: Http | Replicas, queries: list[Query], k: int) -> list[list[Hit]]:
        """The hits of all queries; raises the first error that one of them met."""
        outcomes = self.run(http.ask(queries, k))
        for outcome in outcomes:
            if isinstance(outcome, RetrieverError):
                raise outcome
        return [list(outcome) for outcome in outcomes]

    def close(self) -> None:
        if self._loop.is_running():
            self.run(self._http.close())
            self._loop.call_soon_threadsafe(self._loop.stop)


class Remote(Retriever):
    """Any server that speaks Search-R1's `POST /retrieve`, ours among them; replicas separated by commas."""

    waits = True

    def __init__(self, url: str, deadline_seconds: float = 30.0, token_file: str | None = None) -> None:
        """`deadline_seconds` bounds a search with all its retries; `token_file` holds a bearer token."""
        headers = {"Authorization": f"Bearer {read_secret(token_file)}"} if token_file else {}
        self._http = open_http(url, deadline_seconds, headers)
        self._threads = _FromThreads(self._http)
        self._last = ""
        self._asked_at, self._says_generation = -math.inf, True
        self._takes_images: tuple[str, bool] | None = None  # of a generation

    @property
    def generation(self) -> str:
        """What the server says it is, asked at most once a second; else what answered last, or its URL."""
        if self._says_generation and time.monotonic() - self._asked_at > _STALE_SECONDS:
            self._asked_at = time.monotonic()
            self._last = self._threads.run(self._ask_generation()) or self._last
        return self._last or self._unnamed

    @property
    def _unnamed(self) -> str:
        return f"remote({self._http.url})"

    async def _ask_generation(self) -> str:
        """ "" where nobody says; a server that knows no /healthz is not asked again."""
        try:
            generation = (await self._http.get("/healthz", _HEALTH_SECONDS)).get("generation")
        except RetrieverUnavailable:
            return ""
        except RetrieverRefused:
            generation = None
        self._says_generation = bool(generation)
        return str(generation or "")

    def takes_images(self) -> bool:
        """What the server says in its /v1/info; True where it is not there: let the search tell."""
        generation = self.generation
        if self._takes_images is None or self._takes_images[0] != generation:
            if (says := self._threads.run(self._ask_takes_images())) is None:
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

    def search(self, queries: Sequence[Query], k: int, where: Filter | None = None) -> list[list[Hit]]:
        """What the server finds; raises a RetrieverError where it does not, at the latest at the deadline."""
        if k < 1:
            raise ConfigError(f"k = {k}: must be >= 1")
        http = self._http if where is None else self._http.filtered(where)
        asked = [carried(query) for query in queries]
        rankings = self._threads.ask(http, asked, k) if queries else []
        self._last = next((hit.generation for ranking in rankings for hit in ranking), self._last)
        return [
            [hit if hit.generation else replace(hit, generation=self._unnamed) for hit in ranking]
            for ranking in rankings
        ]

    def probe(self) -> None:
        """As `Http.probe`."""
        self._threads.run(self._http.probe())

    def thumbnail_of(self, passage_id: str, side: int) -> bytes | None:
        """The picture of a passage as the server shows it; None where it has none."""
        try:
            return self._threads.run(self._http.picture(Passage(passage_id, ""), side))
        except RetrieverRefused:
            return None

    def close(self) -> None:
        """Close the connections."""
        self._threads.close()


class Web(Retriever):
    """A web search behind an endpoint that speaks Serper's `POST /search {"q", "num"}`.

    A passage is a result: id and metadata.url the link, its title, and the snippet as text; score 1/rank.
    Answers are kept under `cache`, a file a query, for `max_age_days`, so that a run can be repeated.
    """

    waits = True

    def __init__(
        self,
        url: str,
        key_file: str,
        cache: str,
        max_age_days: float | None = None,
        deadline_seconds: float = 30.0,
        concurrency: int = 8,
    ) -> None:
        """`url` without /search; `key_file` holds the API key, sent as X-API-KEY to that address alone."""
        if concurrency < 1:
            raise ConfigError(f"concurrency = {concurrency}: must be >= 1")
        self._http = _Serper(url.rstrip("/").removesuffix("/search"), deadline_seconds, read_secret(key_file))
        self._threads = _FromThreads(self._http)
        self._cache, self._max_age_days, self._concurrency = Path(cache), max_age_days, concurrency
        self.generation = f"web({urlsplit(url).netloc})"

    def search(self, queries: Sequence[Query], k: int, where: Filter | None = None) -> list[list[Hit]]:
        """The first `k` results of each query, from the cache or the endpoint; raises a RetrieverError."""
        if where is not None or k < 1:
            raise ConfigError(f"web search: k = {k} must be >= 1, filter {where} must be none")
        asked = texts_of(queries, self.generation)
        files = {query: self._file(query, k) for query in asked}
        missing = [query for query, file in files.items() if query.strip() and not self._is_fresh(file)]
        self._threads.run(self._fetch(missing, k, files))
        return [
            _results(read_json(files[query]), k, self.generation) if query.strip() else [] for query in asked
        ]

    def probe(self) -> None:
        """Raise RetrieverUnavailable where nobody listens; a search would be paid for."""
        if reason := why_silent(self._http.url):
            raise RetrieverUnavailable(f"{self._http.url}: {reason}")

    async def _fetch(self, queries: Sequence[str], k: int, files: dict[str, Path]) -> None:
        gate = asyncio.Semaphore(self._concurrency)

        async def one(query: str) -> None:
            async with gate:
                organic = await self._http.organic(query, k)
            write_json(files[query], {"query": query, "k": k, "organic": organic})

        for failure in await asyncio.gather(*map(one, queries), return_exceptions=True):
            if failure is not None:
                raise failure

    def _file(self, query: str, k: int) -> Path:
        name = hashlib.sha256(json.dumps([self._http.url, query, k]).encode()).hexdigest()
        return self._cache / name[:2] / f"{name[:32]}.json"

    def _is_fresh(self, file: Path) -> bool:
        if not file.is_file():
            return False
        age_days = (time.time() - file.stat().st_mtime) / 86400
        return self._max_age_days is None or age_days <= self._max_age_days

    def close(self) -> None:
        """Close the connections."""
        self._threads.close()


class _Serper(Http):
    """The client's manners (deadline, retries, Retry-After, typed errors) towards another wire."""

    def __init__(self, url: str, deadline_seconds: float, key: str) -> None:
        super().__init__(url, deadline_seconds, headers={"X-API-KEY": key})

    async def organic(self, query: str, k: int) -> list[dict[str, Any]]:
        """The results as the endpoint sent them; raises a RetrieverError."""
        [outcome] = await self.ask([query], k)
        if isinstance(outcome, RetrieverError):
            raise outcome
        return outcome  # type: ignore[return-value]

    async def _ask_once(self, queries: list[str], k: int) -> list:
        return [await self._post("/search", {"q": queries[0], "num": k}, _parse_organic)]


def _parse_organic(answer: Any) -> list[dict[str, Any]]:
    organic = answer.get("organic", []) if isinstance(answer, dict) else None
    if not isinstance(organic, list) or not all(isinstance(result, dict) for result in organic):
        raise DataError("the answer has no list `organic` of results")
    return organic


def _results(kept: dict[str, Any], k: int, generation: str) -> list[Hit]:
    """The hits in what was kept of an answer; results without a snippet are left out."""
    found = [result for result in kept["organic"] if result.get("link") and result.get("snippet")]
    return [
        Hit(
            Passage(
                id=str(result["link"]),
                text=str(result["snippet"]),
                title=str(result.get("title", "")),
                metadata={"url": str(result["link"])},
            ),
            1.0 / rank,
            generation,
        )
        for rank, result in enumerate(found[:k], start=1)
    ]


def read_secret(path: str) -> str:
    """The one line in a file; no option, since command lines and recipes are seen and kept."""
    try:
        secret = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if not secret or not secret.isascii() or not secret.isprintable():
        raise ConfigError(f"{path}: must hold a key or token on one line")
    return secret
