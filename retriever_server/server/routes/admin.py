"""Administration and probes: health, metrics, reload, changes of passages, and the search page."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

from data.errors import DataError, SleuthError
from data.formats.rows import parse_passage
from retriever_server.retriever import Retriever
from retriever_server.server import reply_schema
from retriever_server.server.backends import HotSwappable
from retriever_server.server.errors import error_replies
from retriever_server.server.middleware import JsonRoute
from retriever_server.server.replies import JsonReply
from retriever_server.server.schema import PassagesBody, check_unicode
from retriever_server.server.service import CallerOf, SearchService, ServiceOf

_log = logging.getLogger(__name__)
_PAGE = Path(__file__).parents[1] / "search_page.html"

router = APIRouter(route_class=JsonRoute, responses=error_replies(401, 413, 421, 500))


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """Return the search page."""
    return Response(_PAGE.read_bytes(), media_type="text/html; charset=utf-8")


@router.get("/healthz", response_model=reply_schema.HealthReply)
@router.get("/health", include_in_schema=False)
async def healthz(service: ServiceOf) -> dict[str, str]:
    """Say that the process lives."""
    return {"status": "ok", "generation": service.backend().generation}


@router.get("/readyz", response_model=reply_schema.ReadyReply, responses=error_replies(503))
async def readyz(service: ServiceOf) -> dict[str, Any]:
    """Say whether it can take requests: the queue has room, and it is not about to stop."""
    if reason := service.unready:
        raise HTTPException(503, reason)
    return {"status": "ready", "waiting": service.batcher.waiting}


@router.get("/v1/info", response_model=reply_schema.InfoReply)
async def describe(service: ServiceOf) -> Response:
    """Return what answers, by name of backend, and the limits of a request."""
    backends = await asyncio.to_thread(service.describe)
    default, limits = next(iter(backends.values())), service.limits.describe()
    return JsonReply({**default, "limits": limits, "backends": backends, **service.about})


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: ServiceOf) -> Response:
    """Return the metrics for Prometheus."""
    await asyncio.to_thread(service.describe)
    return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.post("/admin/reload", response_model=reply_schema.SwapReply, responses=error_replies(403, 409, 422))
async def reload(service: ServiceOf, backend: str | None = None) -> Response:
    """Open what lies at the backend's place now, and let it answer if it is another generation."""
    of = service.backend(backend)
    try:
        swapped = await asyncio.to_thread(of.reload)
    except Exception as error:
        _log.warning("reload failed: %s", error)
        raise HTTPException(409, f"not swapped: {error}") from error
    return _swapped(service, swapped)


@router.post(
    "/admin/passages", response_model=reply_schema.SwapReply, responses=error_replies(400, 403, 409, 422)
)
async def change(body: PassagesBody, caller: CallerOf) -> Response:
    """Add passages to an index, or delete some: a new generation, which answers from now on."""
    service = caller.service
    backend, make = service.backend(body.backend), _change_in(body)
    try:
        swapped = await asyncio.to_thread(backend.change, make)
    except (SleuthError, OSError) as error:
        said = _without_place(str(error), getattr(backend.current.retriever, "path", None))
        if isinstance(error, DataError):
            raise DataError(said) from error
        raise HTTPException(409, f"not changed: {said}") from error
    threading.Thread(target=_compact, args=[service, backend], daemon=True).start()
    return _swapped(service, swapped)


def _without_place(said: str, place: Path | None) -> str:
    """Name the folder of the index, where a message begins with it or a path does, as "the index"."""
    if place is None:
        return said
    names = "|".join(re.escape(str(each)) for each in (place.absolute(), place))
    return re.sub(rf"(?<!\S)({names})(?=[:/])", "the index", said)


def _change_in(body: PassagesBody) -> Callable[[Retriever], Retriever]:
    """Return the change that is asked for. Raises DataError."""
    if (body.add is None) == (body.delete is None):
        raise DataError("body: must hold add (passages) or delete (ids), and not both")
    if body.delete is not None:
        check_unicode(ids := [str(each) for each in body.delete])
        return methodcaller("delete", ids)
    passages, places = [], dict[str, int]()
    for number, record in enumerate(body.add or ()):
        try:
            passages.append(passage := parse_passage(record))
        except ValueError as error:
            raise DataError(f"add.{number}: {error}") from error
        check_unicode([passage.id])
        if (first := places.setdefault(passage.id, number)) != number:
            raise DataError(f"add.{number}: has the id {passage.id!r} of add.{first}")
        if passage.files:
            raise DataError(f"add.{number}: names a file; `sleuth index --add` takes those")
    return methodcaller("add", passages, body.replace)


def _compact(service: SearchService, backend: HotSwappable) -> None:
    """Merge what many changes have left, in a thread of its own."""
    try:
        if backend.change(methodcaller("compact")):
            service.on_reload()
    except (SleuthError, OSError) as error:  # the disk is full, or too few passages are left for its lists
        _log.warning("%s was not compacted: %s", backend.generation, error)
    except Exception:
        _log.exception("%s was not compacted", backend.generation)


def _swapped(service: SearchService, swapped: bool) -> Response:
    if swapped:
        service.on_reload()
    generations = {name: each.generation for name, each in service.backends.items()}
    return JsonReply({"swapped": swapped, "generations": generations})
