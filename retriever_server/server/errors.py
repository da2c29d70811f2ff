"""Errors of requests: the status and the one-line reason that a client gets, here and in the OpenAPI page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from data.errors import ConfigError, CorpusChanged, DataError, EngineError, RetrieverError
from retriever_server.server.batching import Overloaded
from retriever_server.server.replies import JsonReply

_DESCRIPTIONS = {
    400: "Not JSON",
    401: "No token",
    403: "Not the token of administrators",
    404: "There is no such thing here",
    409: "The new generation does not open",
    413: "Too large",
    421: "Asked under a name that this server does not go by",
    422: "A wrong value",
    429: "Too many queries wait; Retry-After says when to come back",
    500: "An error of the server's own",
    501: "A package that reads images or forms is not installed",
    503: "The search failed; outside of /v1 also: too many queries wait, Retry-After says when to come back",
    504: "The deadline has passed",
}
_OWN = ("/v1/search", "/v1/thumbnail", "/v1/info")
_COHERE = ("/v1/rerank", "/v2/rerank", "/rerank")
_TEI = ("/", "/info", "/embed", "/embed_sparse", "/embed_all", "/rerank")
CLIENT_HEADER = "x-client-source"
"""Header in which Tavily's clients name themselves."""
ANY_SEARCH = (400, 401, 413, 421, 422, 500, 501, 503, 504)
"""Statuses of whatever searches, encodes or scores."""


class ErrorReply(BaseModel):
    """The reason why a request was not answered."""

    detail: str


def error_replies(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route or router that may answer with these statuses."""
    return {status: {"model": ErrorReply, "description": _DESCRIPTIONS[status]} for status in statuses}


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class WrongQuery(DataError):
    """This query of the request, and no other, cannot be searched."""


class QueryFailed(Exception):
    """A query of the request met this error; its text is for clients, and names no path."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error) if isinstance(error, WrongQuery) else f"search failed: {_public(error)}")
        self.error = error


def _public(error: Exception) -> str:
    if isinstance(error, DataError | ConfigError):
        return "the server cannot read its own data; its log says more"
    reason = (error.strerror if isinstance(error, OSError) else None) or without_paths(str(error))
    return f"{type(error).__name__}: {reason}"


def without_paths(text: str) -> str:
    """Return the text with "..." for each path.   "/srv/a.npy: gone" -> "...: gone"; http://h/a stays."""
    return _PATHS.sub(lambda found: found[0] if found[0].startswith("http") else "...", text)


_PATHS = re.compile(r"https?://\S+|(?:[\w.~%-]*/)+[\w.~%#=-]*")


def add_error_replies(app: FastAPI) -> None:
    """Register the answer {"detail": reason} for all errors."""
    for kind in (
        *(DataError, ConfigError, RetrieverError, EngineError, CorpusChanged, QueryFailed, Overloaded),
        *(TimeoutError, RequestValidationError, HTTPException, ClientGone, ClientDisconnect, Exception),
    ):
        app.add_exception_handler(kind, answer_error)


async def answer_error(request: Request, error: Exception) -> JsonReply:
    """Answer with the status and the reason of what a route raised."""
    status, reason = status_and_reason(error)
    path, client = request.url.path, request.headers.get(CLIENT_HEADER, "")
    if status == 422 and (_is_openai(path) or _is_tavily(client)):
        status = 400  # as they have it
    if isinstance(error, HTTPException) and reason == HTTPStatus(status).phrase:  # no route of ours said it
        reason = f"{request.method} {path[:80]}: {reason.lower()}; /openapi.json lists the routes"
    headers = getattr(error, "headers", None)
    if isinstance(error, Overloaded):
        # Clients of other projects come back after 503 alone: some take 429 for an answer without hits.
        status = 429 if path.startswith("/v1/") else 503
        headers = {"Retry-After": str(error.retry_after_seconds)}
    return JsonReply(error_body(path, status, reason, client), status, headers)


def error_body(path: str, status: int, reason: str, client: str = "") -> dict[str, Any]:
    """Return the JSON of an error: the reason, also where clients of those who made such a route look.

    client: what the request's CLIENT_HEADER says.
    """
    if _is_tavily(client):
        return {"detail": {"error": reason}}
    body: dict[str, Any] = {"detail": reason}
    if path in _COHERE:
        body["message"] = reason
    if path in _TEI:
        body |= {"error": reason, "error_type": "Validation" if status < 500 else "Backend"}
    if _is_openai(path):
        kind = "invalid_request_error" if status < 500 else "server_error"
        body["error"] = {"message": reason, "type": kind, "param": None, "code": None}
    return body


def _is_openai(path: str) -> bool:
    return path.startswith("/v1/") and not path.startswith(_OWN) and path not in _COHERE


def _is_tavily(client: str) -> bool:
    return "tavily" in client.lower()


def status_and_reason(error: Exception) -> tuple[int, str]:
    """Return the status that answers an error, and its reason for clients."""
    match error:
        case HTTPException():
            return error.status_code, str(error.detail)
        case RequestValidationError():
            return 422, first_of(error.errors())
        case QueryFailed():
            return 422 if isinstance(error.error, WrongQuery) else 503, str(error)
        case ClientGone() | ClientDisconnect():
            return 499, "the client has gone"
        case DataError():
            return 422, str(error)
        case ConfigError():
            return 501, str(error)
        case RetrieverError() | EngineError() | CorpusChanged() | Overloaded():
            return 503, without_paths(str(error))
        case TimeoutError():
            return 504, str(error)
    return 500, "an error of the server; its log says more"


def first_of(errors: Sequence[Any]) -> str:
    """Return the first of a validator's errors: "field: what is wrong"."""
    first = errors[0]
    if first["loc"] and _is_branch(first["loc"][-1]):  # no branch fits: the one that got furthest says most
        above = first["loc"][:-1]
        tried = [error for error in errors if error["loc"][: len(above)] == above]
        first = max(tried, key=lambda error: len(error["loc"]))
    place = ".".join(str(part) for part in first["loc"] if not _is_branch(part))
    # Whose message names a class of ours.
    said = "must be a JSON object" if first["type"] in ("model_type", "dict_type") else first["msg"]
    return f"{place or 'body'}: {said}{_given(first)}"


def _given(error: Mapping[str, Any]) -> str:
    """Return what stood there instead, where that is short to say.   ', not "3"'"""
    given = error.get("input")
    told = error["type"] in ("missing", "extra_forbidden", "too_short", "too_long")
    told = told or isinstance(given, Mapping | list)
    return "" if told else f", not {json.dumps(given, default=str)[:40]}"


def _is_branch(part: Any) -> bool:
    """Return whether a part of a place is pydantic's name of a branch of a union: str, Text, list[...]."""
    return isinstance(part, str) and (part in _PLAIN or "[" in part or part[:1].isupper())


_PLAIN = ("str", "int", "float", "bool")
