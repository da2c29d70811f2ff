"""The HTTP server: `POST /v1/search`, every dialect of `/retrieve`, probes, metrics, reload, search page.

A wrong request is answered with 4xx, a failed search with 503, one that took too long with 504, too many
with Retry-After and 429, or 503 where other projects' clients ask: all as {"detail": reason}, which names no
path. Searches run in threads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from data.errors import ConfigError, CorpusChanged, DataError, RetrieverError
from data.records import Hit
from retriever_server.client.wire import thumbnail_link
from retriever_server.retriever import Retriever
from retriever_server.server import schema
from retriever_server.server.batching import Batching, Overloaded
from retriever_server.server.hot_swap import Live
from retriever_server.server.middleware import Access, Guard
from retriever_server.server.routes import dialects
from retriever_server.server.routes.adapters import add_adapters, add_mcp, make_mcp
from retriever_server.server.schema import documented, read, reply
from retriever_server.server.service import (
    ClientGone,
    Limits,
    Outcome,
    QueryFailed,
    Service,
    WrongQuery,
    without_paths,
)

__all__ = ["Limits", "create_app"]

_log = logging.getLogger(__name__)

_PAGE = Path(__file__).with_name("search_page.html")
Asking = TypeVar("Asking", bound=schema.Narrowed)
_OWN, _PEERS = schema.troubles(), schema.troubles(own=False)
_LONG_ANSWER = 64
"""Rankings; more are written in a thread."""


def create_app(
    retriever: Retriever | Mapping[str, Live],
    limits: Limits | None = None,
    info: Mapping[str, Any] | None = None,
    *,
    batching: Batching | None = None,
    dialect: str = "rllm",
    token: str | None = None,
    admin_token: str | None = None,
    hosts: Collection[str] | None = None,
    image_folders: Sequence[str | Path] = (),
    request_log: Path | None = None,
    watch_seconds: float = 0.0,
    with_mcp: bool = False,
    on_reload: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The application that serves a retriever, or several by name, of which the first is the default.

    info joins what `/v1/info` tells; dialect answers what two clients ask alike; token,
    admin_token and hosts say who may ask (see `guard.Access`); image_folders: where, beside the folder of a
    corpus, its pictures may lie; request_log gets a JSON line a request; watch_seconds: how often to look
    for a new generation (0: never); with_mcp mounts `/mcp`; on_reload is called after `/admin/reload`
    has swapped.
    """
    if dialect not in dialects.DIALECTS:
        raise ConfigError(f"dialect {dialect!r}: must be one of {', '.join(dialects.DIALECTS)}")
    backends = {"default": Live(retriever)} if isinstance(retriever, Retriever) else retriever
    limits = limits or Limits()
    service = Service(backends, limits, batching or Batching(), image_folders)
    mcp = make_mcp(service) if with_mcp else None

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(service.describe)
        watching = [
            asyncio.create_task(live.watch(watch_seconds)) for live in backends.values() if watch_seconds
        ]
        async with AsyncExitStack() as stack:
            if mcp is not None:
                await stack.enter_async_context(mcp.session_manager.run())
            yield
        for task in watching:
            task.cancel()
        await service.close()

    # No documentation pages: they load scripts from other hosts.
    app = FastAPI(title="Sleuth retriever", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    app.add_middleware(
        Guard,
        metrics=service.metrics,
        access=Access(token, admin_token, hosts),
        max_body_bytes=limits.max_body_bytes,
        request_log=request_log,
    )
    for kind, answer in _TROUBLES.items():
        app.add_exception_handler(kind, answer)
    _add_search(app, service)
    _add_dialects(app, service, dialect)
    _add_administration(app, service, dict(info or {}), on_reload)
    add_adapters(app, service)
    if mcp is not None:
        add_mcp(app, mcp, guarded=token is not None or hosts is not None)
    return app


def _add_search(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/search",
        responses={200: {"model": schema.SearchReply}, **_OWN},
        openapi_extra=documented(schema.SearchBody),
    )
    async def search(request: Request) -> Response:
        """The best passages of each query; a query that fails has an error instead of hits."""
        body = await schema.read_search(request, service.limits.max_body_bytes)
        found = await service.search(
            body.queries, body.top_k, body.where, body.backend, request, body.deadline_seconds, body.stages
        )

        def write() -> Response:
            results = [_result(outcome, found.linked) for outcome in found.outcomes]
            answer = {"results": results, "backend": found.backend, "generation": found.generation}
            return reply({**answer, **({"stages": found.stages} if body.stages else {})})

        return await _written(write, len(found.outcomes))

    @app.get(
        "/v1/thumbnail/{passage_id:path}",
        response_class=Response,
        responses={200: {"content": {"image/jpeg": {}}}, 404: {"model": schema.Trouble}, **_OWN},
    )
    async def thumbnail(
        request: Request, passage_id: str, side: int = 256, backend: str | None = None
    ) -> Response:
        """The picture of a passage of the corpus, at most `side` pixels wide and high; nothing else."""
        made = await service.wait(service.thumbnail(passage_id, side, backend), request)
        if made is None:
            raise HTTPException(404, f"no picture of a passage {passage_id[:80]!r}")
        headers = {"Cache-Control": "private, max-age=300"}
        return Response(made, media_type="image/jpeg", headers=headers)


async def _written(write: Callable[[], Response], rankings: int) -> Response:
    return await asyncio.to_thread(write) if rankings > _LONG_ANSWER else write()


def _result(outcome: Outcome, backend: str | None) -> dict[str, Any]:
    if isinstance(outcome, Exception):
        return {"hits": [], "error": str(QueryFailed(outcome))}
    return {"hits": [_render(hit, backend) for hit in outcome], "error": None}


def _render(hit: Hit, backend: str | None) -> dict[str, Any]:
    passage = hit.passage
    fields = {"id": passage.id, "title": passage.title, "text": passage.text, "metadata": passage.metadata}
    if passage.verbatim:
        fields["contents"] = passage.verbatim
    if passage.image:
        fields["thumbnail"] = thumbnail_link(passage, backend)
    return {**fields, "score": hit.score, "generation": hit.generation}


def _add_dialects(app: FastAPI, service: Service, dialect: str) -> None:
    async def answer(request: Request, asked: dialects.Asked, body: schema.Narrowed) -> Response:
        given = body.where, body.backend, request, body.deadline_seconds
        found = await service.search(asked.queries, asked.top_k, *given)
        asked, rankings = replace(asked, backend=found.linked), found.rankings()
        return await _written(
            lambda: reply(dialects.SHAPES[asked.shape](asked, rankings, found.generation)), len(rankings)
        )

    def add(path: str, model: type[Asking], understand: Callable[[Asking], dialects.Asked]) -> None:
        async def endpoint(request: Request) -> Response:
            body = await read(request, model, service.limits.max_body_bytes)
            return await answer(request, understand(body), body)

        summary = f"Search, as the clients of other projects ask for it: {path[1:]}"
        app.post(path, summary=summary, responses=_PEERS, openapi_extra=documented(model))(endpoint)

    add("/retrieve", schema.RetrieveBody, lambda body: dialects.asked_of_retrieve(body, dialect))
    add("/search", schema.SingleSearchBody, dialects.asked_of_search)
    add("/batch_search", schema.BatchSearchBody, dialects.asked_of_batch_search)

    @app.post("/access", responses=_PEERS, openapi_extra=documented(schema.AccessBody))
    async def access(request: Request) -> Response:
        """Pages of the corpus by id or url; null for what is not in it. Nothing else is ever fetched."""
        body = await read(request, schema.AccessBody, service.limits.max_body_bytes)
        if len(body.urls) > service.limits.max_queries:
            raise DataError(f"urls: {len(body.urls)}, at most {service.limits.max_queries} are allowed")
        pages = await service.fetch(body.urls)
        shown = [{"contents": page.contents} if page else None for page in pages]
        return reply({"result": shown})


def _add_administration(
    app: FastAPI, service: Service, info: dict[str, Any], on_reload: Callable[[], None]
) -> None:
    router = APIRouter(responses={status: _OWN[status] for status in (401, 413, 421, 500)})

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(_PAGE.read_bytes(), media_type="text/html; charset=utf-8")

    @router.get("/healthz")
    @router.get("/health", include_in_schema=False)
    async def healthz() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok", "generation": service.default.generation}

    @router.get("/readyz", responses={503: {"model": schema.Trouble}})
    async def readyz() -> dict[str, Any]:
        """It can take requests: the queue has room, and it is not about to stop."""
        if reason := service.unready:
            raise HTTPException(503, reason)
        return {"status": "ready", "waiting": service.batcher.waiting}

    @router.get("/v1/info")
    async def describe() -> Response:
        """What answers, by name of backend, and the limits of a request."""
        backends = await asyncio.to_thread(service.describe)
        default = next(iter(backends.values()))
        return reply({**default, "limits": asdict(service.limits), "backends": backends, **info})

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        await asyncio.to_thread(service.describe)
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @router.post("/admin/reload", responses={status: {"model": schema.Trouble} for status in (403, 409, 422)})
    async def reload(backend: str | None = None) -> Response:
        """Open what lies at the backend's place now, and let it answer if it is another generation."""
        try:
            swapped = await asyncio.to_thread(service.reload, backend)
        except Exception as error:
            _log.warning("reload failed: %s", error)
            raise HTTPException(409, f"not swapped: {error}") from error
        if swapped:
            on_reload()
        generations = {name: live.generation for name, live in service.backends.items()}
        return reply({"swapped": swapped, "generations": generations})

    app.include_router(router)


def _trouble(status: int, reason: str, headers: Mapping[str, str] | None = None) -> Response:
    return reply({"detail": reason}, status, headers)


def _failed(error: QueryFailed) -> Response:
    return _trouble(422 if isinstance(error.error, WrongQuery) else 503, str(error))


async def _overloaded(request: Request, error: Any) -> Response:
    """Clients of other projects come back after 503 alone: some take 429 for an answer without hits."""
    status = 429 if request.url.path.startswith("/v1/") else 503
    return _trouble(status, str(error), {"Retry-After": str(error.retry_after_seconds)})


def _answer_with(make: Callable[[Any], Response]) -> Callable[[Request, Any], Awaitable[Response]]:
    async def answer(_: Request, error: Any) -> Response:
        return make(error)

    return answer


_TROUBLES: dict[type[Exception], Callable[[Request, Any], Awaitable[Response]]] = {
    DataError: _answer_with(lambda error: _trouble(422, str(error))),
    ConfigError: _answer_with(lambda error: _trouble(501, str(error))),
    RequestValidationError: _answer_with(lambda error: _trouble(422, schema.first_of(error.errors()))),
    HTTPException: _answer_with(lambda e: _trouble(e.status_code, str(e.detail), e.headers)),
    Overloaded: _overloaded,
    **dict.fromkeys(
        (RetrieverError, CorpusChanged), _answer_with(lambda error: _trouble(503, without_paths(str(error))))
    ),
    Exception: _answer_with(lambda error: _trouble(500, "an error of the server; its log says more")),
    TimeoutError: _answer_with(lambda error: _trouble(504, str(error))),
    **dict.fromkeys(
        (ClientGone, ClientDisconnect), _answer_with(lambda error: _trouble(499, "the client has gone"))
    ),
    QueryFailed: _answer_with(_failed),
}
