"""The HTTP server: Search-R1's `POST /retrieve`, `GET /healthz`, `GET /v1/info`.

A wrong request is answered with 4xx, a failed search with 500, both as {"detail": reason}. The
search runs in a thread, so that the server answers others (and `/healthz`) meanwhile.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from starlette.concurrency import run_in_threadpool

from data.errors import ConfigError, DataError
from retriever_server.retriever import Retriever
from retriever_server.wire import RetrieveRequest, parse_request, render_hits

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; more is answered with 4xx."""

    default_top_k: int = 3
    """Passages a query where the client says `topk: null`."""
    max_top_k: int = 100
    max_queries: int = 512
    max_query_chars: int = 8192
    max_body_bytes: int = 8 << 20

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ConfigError(f"{name} = {value}: must be >= 1")
        if self.default_top_k > self.max_top_k:
            raise ConfigError(
                f"default_top_k = {self.default_top_k}: must be <= max_top_k = {self.max_top_k}"
            )


def create_app(
    retriever: Retriever, limits: Limits | None = None, info: Mapping[str, Any] | None = None
) -> FastAPI:
    """The application that serves `retriever`. `info` joins generation and limits in `/v1/info`."""
    limits = limits or Limits()
    # No documentation pages: they load scripts from other hosts.
    app = FastAPI(title="Sleuth retriever", docs_url=None, redoc_url=None)

    @app.post("/retrieve")
    async def retrieve(request: Request) -> dict[str, Any]:
        asked = _parse(await _read_body(request, limits.max_body_bytes))
        _check(asked, limits)
        try:
            rankings = await run_in_threadpool(
                retriever.search, asked.queries, asked.top_k or limits.default_top_k
            )
        except Exception as error:
            _log.exception("search failed")
            raise HTTPException(500, f"search failed: {type(error).__name__}: {error}") from error
        return render_hits(rankings, retriever.generation, asked.return_scores)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok", "generation": retriever.generation}

    @app.get("/v1/info")
    async def describe() -> dict[str, Any]:
        return {"generation": retriever.generation, "limits": asdict(limits), **(info or {})}

    return app


async def _read_body(request: Request, max_bytes: int) -> bytes:
    """The body, read no further than the limit."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise HTTPException(413, f"body: more than {max_bytes} bytes")
    return bytes(body)


def _parse(body: bytes) -> RetrieveRequest:
    try:
        return parse_request(json.loads(body))
    except DataError as error:
        raise HTTPException(422, str(error)) from error
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"body: not JSON ({error})") from error


def _check(asked: RetrieveRequest, limits: Limits) -> None:
    longest = max(map(len, asked.queries), default=0)
    if len(asked.queries) > limits.max_queries:
        reason = f"queries: {len(asked.queries)}, at most {limits.max_queries} are allowed"
    elif longest > limits.max_query_chars:
        reason = f"queries: one of {longest} characters, at most {limits.max_query_chars} allowed"
    elif asked.top_k is not None and not 1 <= asked.top_k <= limits.max_top_k:
        reason = f"topk = {asked.top_k}: must be from 1 to {limits.max_top_k}"
    else:
        return
    raise HTTPException(422, reason)
