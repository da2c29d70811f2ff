"""Administration and probes: health, metrics, reload, and the search page."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from retriever_server.server.errors import error_replies
from retriever_server.server.replies import JsonReply
from retriever_server.server.service import ServiceOf

_log = logging.getLogger(__name__)
_PAGE = Path(__file__).parents[1] / "search_page.html"

router = APIRouter(responses=error_replies(401, 413, 421, 500))


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """Return the search page."""
    return Response(_PAGE.read_bytes(), media_type="text/html; charset=utf-8")


@router.get("/healthz")
@router.get("/health", include_in_schema=False)
async def healthz(service: ServiceOf) -> dict[str, str]:
    """Say that the process lives."""
    return {"status": "ok", "generation": service.backend().generation}


@router.get("/readyz", responses=error_replies(503))
async def readyz(service: ServiceOf) -> dict[str, Any]:
    """Say whether it can take requests: the queue has room, and it is not about to stop."""
    if reason := service.unready:
        raise HTTPException(503, reason)
    return {"status": "ready", "waiting": service.batcher.waiting}


@router.get("/v1/info")
async def describe(service: ServiceOf) -> Response:
    """Return what answers, by name of backend, and the limits of a request."""
    backends = await asyncio.to_thread(service.describe)
    default, limits = next(iter(backends.values())), service.limits.describe()
    return JsonReply({**default, "limits": limits, "backends": backends, **service.about})


@router.get("/metrics", response_class=Response)
async def metrics(service: ServiceOf) -> Response:
    """Return the metrics for Prometheus."""
    await asyncio.to_thread(service.describe)
    return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.post("/admin/reload", responses=error_replies(403, 409, 422))
async def reload(service: ServiceOf, backend: str | None = None) -> Response:
    """Open what lies at the backend's place now, and let it answer if it is another generation."""
    try:
        swapped = await asyncio.to_thread(service.backend(backend).reload)
    except Exception as error:
        _log.warning("reload failed: %s", error)
        raise HTTPException(409, f"not swapped: {error}") from error
    if swapped:
        service.on_reload()
    generations = {name: each.generation for name, each in service.backends.items()}
    return JsonReply({"swapped": swapped, "generations": generations})
