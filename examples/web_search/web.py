"""A paid web search as a retriever: any endpoint that speaks Serper's `POST /search {"q", "num"}`.

It asks through the client's own HTTP: deadline, retries, Retry-After, typed errors.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data.errors import ConfigError, DataError, RetrieverError, RetrieverUnavailable
from data.jsonl import read_json, write_json
from data.machine.listening import why_silent
from data.records import Hit, Passage
from data.secret import read_secret
from retriever_server.client.bridge import Bridge
from retriever_server.client.http import Http
from retriever_server.retriever import Filter, Query, Retriever, texts_of


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
        key = read_secret(key_file, "key_file")
        self._http = _Serper(url.rstrip("/").removesuffix("/search"), deadline_seconds, key)
        self._bridge = Bridge()
        self._cache, self._max_age_days, self._concurrency = Path(cache), max_age_days, concurrency
        self.generation = f"web({urlsplit(url).netloc})"

    def search(self, queries: Sequence[Query], k: int, where: Filter | None = None) -> list[list[Hit]]:
        """Return the first `k` results of each query, kept or fetched; raises a RetrieverError."""
        if where is not None or k < 1:
            raise ConfigError(f"web search: k = {k} must be >= 1, filter {where} must be none")
        asked = texts_of(queries, self.generation)
        files = {query: self._file(query, k) for query in asked}
        missing = [query for query, file in files.items() if query.strip() and not self._is_fresh(file)]
        self._bridge.run(self._fetch(missing, k, files))
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
        self._bridge.close(self._http.close())


class _Serper(Http):
    """The client's manners (deadline, retries, Retry-After, typed errors) towards another wire."""

    def __init__(self, url: str, deadline_seconds: float, key: str) -> None:
        super().__init__(url, deadline_seconds, headers={"X-API-KEY": key})

    async def organic(self, query: str, k: int) -> list[dict[str, Any]]:
        """Return the results as the endpoint sent them; raises a RetrieverError."""
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
    """Return the hits in what was kept of an answer; results without a snippet are left out."""
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
