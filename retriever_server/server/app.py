"""The HTTP server: `POST /v1/search`, every dialect of `/retrieve`, probes, metrics, reload, search page.

A wrong request is answered with 4xx, a failed search with 503, one that took too long with 504, too many
with Retry-After and 429, or 503 where other projects' clients ask: all as {"detail": reason}, which names no
path. Searches run in threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from data.errors import ConfigError
from retriever_server.retriever import Retriever
from retriever_server.server.backends import HotSwappable
from retriever_server.server.batching import Batching
from retriever_server.server.config import Limits
from retriever_server.server.errors import add_error_replies
from retriever_server.server.middleware import Access, RequestLog, RequestMiddleware
from retriever_server.server.routes import admin, dialects, embeddings, search
from retriever_server.server.routes.mcp import add_mcp, make_mcp
from retriever_server.server.service import SearchService

__all__ = ["Limits", "create_app"]
_TOKENS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def create_app(
    retriever: Retriever | Mapping[str, HotSwappable],
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
    """Return the application that serves a retriever, or several by name, of which the first is the default.

    info joins what `/v1/info` tells; dialect answers what two clients ask alike; token, admin_token and hosts
    say who may ask (see `middleware.Access`); image_folders: where, beside the folder of a corpus, its
    pictures may lie; request_log gets a JSON line a request; watch_seconds: how often to look for a new
    generation (0: never); with_mcp mounts `/mcp`; on_reload is called after `/admin/reload` has swapped.
    """
    if dialect not in dialects.DIALECTS:
        raise ConfigError(f"dialect {dialect!r}: must be one of {', '.join(dialects.DIALECTS)}")
    backends = {"default": HotSwappable(retriever)} if isinstance(retriever, Retriever) else retriever
    limits = limits or Limits()
    service = SearchService(backends, limits, batching or Batching(), image_folders, dialect, info, on_reload)
    mcp = make_mcp(service) if with_mcp else None
    # No documentation pages: they load scripts from other hosts.
    app = FastAPI(
        title="Sleuth retriever",
        docs_url=None,
        redoc_url=None,
        lifespan=lambda _: _lifespan(service, watch_seconds, mcp),
    )
    app.state.service = service
    access = Access(token, admin_token, hosts)
    # Opened now: the middleware is made when it serves.
    log = RequestLog(request_log) if request_log else None
    app.add_middleware(
        RequestMiddleware,
        metrics=service.metrics,
        access=access,
        max_body_bytes=limits.max_body_bytes,
        request_log=log,
    )
    add_error_replies(app)
    for router in (dialects.router, search.router, embeddings.router, admin.router):
        app.router.routes.extend(router.routes)  # side by side: a router in a router matches each twice
    if mcp is not None:
        add_mcp(app, mcp, guarded=token is not None or hosts is not None)
    if token or admin_token:
        _describe_tokens(app, access)
    return app


def _describe_tokens(app: FastAPI, access: Access) -> None:
    """Let the OpenAPI page tell which routes need a token, and how it is sent."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        page = plain()
        page["components"]["securitySchemes"] = _TOKENS
        for path, methods in page["paths"].items():
            for method, route in methods.items():
                if access.refusal(method.upper(), path, {}):
                    route["security"] = [{name: []} for name in _TOKENS]
        return page

    app.openapi = described


@asynccontextmanager
async def _lifespan(service: SearchService, watch_seconds: float, mcp: Any) -> AsyncIterator[None]:
    await asyncio.to_thread(service.describe)
    backends = service.backends.values()
    watching = [asyncio.create_task(each.watch(watch_seconds)) for each in backends if watch_seconds]
    async with AsyncExitStack() as stack:
        if mcp is not None:
            await stack.enter_async_context(mcp.session_manager.run())
        yield
    for task in watching:
        task.cancel()
    await service.close()
