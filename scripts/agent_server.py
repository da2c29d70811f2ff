"""A policy that searches behind OpenAI's `/v1/chat/completions`, and a page to ask it.

A message has, beside its content, `reasoning_content` (thoughts), `searches` (each with the passages found)
and `citations`: ids of the passages that the answer names, or that hold it.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

import retriever_server.server
from retriever_server.server.errors import ClientGone, add_error_replies, error_body, status_and_reason
from retriever_server.server.middleware import JsonRoute
from retriever_server.server.replies import JsonReply, find_model, list_models
from retriever_server.server.reply_schema import ModelReply, ModelsReply
from retriever_server.server.service import Caller
from scripts.agent_service import AgentService, ChatBody

CHAT = "/v1/chat/completions"
_ANY_MODEL = (None, "dummy")
"""`dummy` is what huggingface_hub's InferenceClient calls a model that it was not told."""
router = APIRouter(route_class=JsonRoute)


async def _request(request: Request) -> Request:
    return request


async def _service(request: Request) -> AgentService:
    return request.app.state.service


_RequestOf = Annotated[Request, Depends(_request)]
_ServiceOf = Annotated[AgentService, Depends(_service)]


def create_app(service: AgentService, **options: Any) -> FastAPI:
    """Return the application; options: `lifespan` of FastAPI."""
    app = FastAPI(title="Sleuth agent", docs_url=None, redoc_url=None, **options)
    app.state.service = service
    add_error_replies(app)
    app.router.routes.extend(router.routes)
    return app


class FoundPassage(BaseModel):
    """A passage that a search found."""

    id: str
    title: str
    text: str
    url: str
    score: float
    generation: str


class SearchMade(BaseModel):
    """A search of the policy."""

    query: str
    tool: str
    passages: list[FoundPassage]
    seconds: float


class Said(BaseModel):
    """The message of the policy."""

    role: Literal["assistant"]
    content: str | None
    citations: list[str]
    confidence: float | None = None
    reasoning_content: str
    searches: list[SearchMade]


class Choice(BaseModel):
    """The one answer."""

    index: int
    message: Said
    finish_reason: Literal["stop", "length"]
    stop_reason: str


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatReply(BaseModel):
    """Answer of `/v1/chat/completions`; a stream tells the same in parts."""

    id: str
    created: int
    model: str
    object: Literal["chat.completion"]
    choices: list[Choice]
    usage: Usage


@router.post(CHAT, response_model=ChatReply)
async def chat(body: ChatBody, caller: _RequestOf) -> Response:
    """Answer the last message."""
    service: AgentService = caller.app.state.service
    if body.model not in _ANY_MODEL:
        find_model([service.name], body.model)
    service.check(body)  # before a stream begins
    waiting = Caller(cast(Any, service), caller)
    frame = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
    if body.stream:
        return StreamingResponse(_stream(service, body, waiting, frame), media_type="text/event-stream")
    answer = await waiting.wait(service.answer(body, lambda part: None))
    usage = answer.pop("usage")
    choices = [{"index": 0, **answer}]
    return JsonReply({**frame, "object": "chat.completion", "choices": choices, "usage": usage})


@router.get("/v1/models", response_model=ModelsReply)
async def models(service: _ServiceOf) -> dict[str, Any]:
    """Name the policy."""
    return list_models([service.name])


@router.get("/v1/models/{name:path}", response_model=ModelReply)
async def model(name: str, service: _ServiceOf) -> dict[str, Any]:
    """Describe the policy."""
    return find_model([service.name], name)


@router.get("/healthz")
async def healthz(service: _ServiceOf) -> dict[str, Any]:
    """Say that the process lives."""
    return {"status": "ok", "waiting": service.waiting}


@router.get("/readyz")
async def readyz(service: _ServiceOf) -> dict[str, Any]:
    """Say whether it is not about to stop."""
    if service.stopping:
        raise HTTPException(503, "the server is stopping")
    return {"status": "ready", "waiting": service.waiting}


@router.get("/metrics")
async def metrics(service: _ServiceOf) -> Response:
    """Return the metrics for Prometheus."""
    return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.get("/")
async def page() -> Response:
    """Return the page, in the style of the retriever server's."""
    own = Path(__file__).with_name("ask_page.html").read_text("utf-8")
    others = Path(str(retriever_server.server.__file__)).with_name("search_page.html").read_text("utf-8")
    style = others.split("<style>")[1].split("</style>")[0]
    return Response(own.replace("/* style */", style), media_type="text/html; charset=utf-8")


async def _stream(
    service: AgentService, body: ChatBody, waiting: Caller, frame: dict[str, Any]
) -> AsyncIterator[str]:
    """Tell the parts of a message as server-sent events; an error that comes too late for a status, too."""
    parts: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    def event(delta: dict[str, Any], **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": None, **more}
        return _event({**frame, "object": "chat.completion.chunk", "choices": [choice]})

    answering = asyncio.create_task(waiting.wait(service.answer(body, parts.put_nowait)))
    answering.add_done_callback(lambda _: parts.put_nowait(None))
    try:
        yield event({"role": "assistant", "content": ""})
        while (part := await parts.get()) is not None:
            yield event(part)
        answer = await answering
        yield event({}, finish_reason=answer["finish_reason"], stop_reason=answer["stop_reason"])
        if body.stream_options and body.stream_options.include_usage:
            chunk = {**frame, "object": "chat.completion.chunk", "choices": [], "usage": answer["usage"]}
            yield _event(chunk)
        yield "data: [DONE]\n\n"
    except ClientGone:
        return
    except Exception as error:
        yield _event(error_body(CHAT, *status_and_reason(error)))
    finally:
        answering.cancel()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
