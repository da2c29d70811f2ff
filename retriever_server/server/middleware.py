"""Middleware: who may ask, how much may be sent, metrics, the request log, JSON bodies.

What may not pass is refused before a body is read, which no dependency of a route could.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import json
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from data.errors import ConfigError
from retriever_server.server.batching import Overloaded
from retriever_server.server.errors import CLIENT_HEADER, error_body
from retriever_server.server.metrics import Metrics
from retriever_server.server.replies import JsonReply

OPEN_TO_ALL = {"/", "/healthz", "/readyz", "/health"}
"""Paths that need no token: the page holds no passages, and a probe has no secrets."""
_BODIES_HELD, _SMALL_BODY_BYTES = 32, 1 << 16
"""The most large bodies held in memory at once; small ones, up to so many bytes, are always taken."""
_NEEDED = "a bearer token is needed: Authorization: Bearer ..., or X-API-Key: ..."


@dataclass(frozen=True)
class Access:
    """Tokens, and the routes that each opens. One comes as `Authorization: Bearer ...` or as `X-API-Key`."""

    token: str | None = field(default=None, repr=False)
    """Token needed for all but reading what is `OPEN_TO_ALL`."""
    admin_token: str | None = field(default=None, repr=False)
    """Needed to administer, and good for all else; without it `token` administers."""
    hosts: Collection[str] | None = None
    """Names that this server goes by where there is no token, beside addresses and loopback names; None: any.

    A page of the web can have its own name resolve to this machine; the browser then lets it read answers.
    """

    def refusal(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> tuple[int, str] | None:
        """Return the status and the reason with which a request is refused; None if it may pass."""
        if path.startswith("/admin/"):
            return self._administration(headers)
        if self.token is None:
            return self._unnamed(headers.get(b"host", b""))
        is_open = path in OPEN_TO_ALL and method in ("GET", "HEAD")
        if is_open or _carries(headers, self.token, self.admin_token):
            return None
        return 401, _NEEDED

    def _administration(self, headers: Mapping[bytes, bytes]) -> tuple[int, str] | None:
        needed = self.admin_token or self.token
        if needed is None:
            return 403, "administration needs a server with a token (--token_file or --admin_token_file)"
        if _carries(headers, needed):
            return None
        if _carries(headers, self.token):
            return 403, "administration needs the token of administrators"
        return 401, _NEEDED

    def _unnamed(self, host: bytes) -> tuple[int, str] | None:
        name = _name_in(host.decode("latin-1"))
        if self.hosts is None or not name or name in self.hosts or _is_own(name):
            return None
        return (
            421,
            f"{name[:100]!r} is no name of this server (--allowed_hosts names more; a token does, too)",
        )


def _carries(headers: Mapping[bytes, bytes], *tokens: str | None) -> bool:
    scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
    given = (bearer.strip() if scheme.lower() == b"bearer" else b"", headers.get(b"x-api-key", b""))
    right = [token.encode() for token in tokens if token]
    return any([hmac.compare_digest(one, other) for one in given for other in right])


def _name_in(host: str) -> str:
    """Return the name in a Host header.   "LocalHost.:8000" -> "localhost"; "[::1]:8000" -> "::1" """
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.strip().lower().rstrip(".")


def _is_own(name: str) -> bool:
    """Return whether it is an address, or a name that every machine gives itself alone."""
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return name == "localhost" or name.endswith(".localhost")


class RequestMiddleware:
    """Checks access and size of each request, notes its metrics and log line, adds headers to its answer."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        access: Access,
        max_body_bytes: int = 8 << 20,
        request_log: RequestLog | None = None,
    ) -> None:
        self._app, self._metrics, self._access, self._max_bytes = app, metrics, access, max_body_bytes
        self._held = 0
        """Bytes of the bodies of all requests that are worked on."""
        self._log = request_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start, status = time.perf_counter(), 499  # where nothing was sent: the client had gone
        held = 0
        headers = {name: value for name, value in scope["headers"] if name in _READ}
        request_id = headers.get(b"x-request-id", b"")[:64] or uuid.uuid4().hex.encode()
        scope["facts"] = {}

        async def note_and_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_ALWAYS, (b"x-request-id", request_id)]
            await send(message)

        async def count_and_receive() -> Message:
            nonlocal held
            message = await receive()
            size = len(message.get("body", b""))
            held, self._held = held + size, self._held + size
            if held > self._max_bytes:
                raise HTTPException(413, f"body: more than {self._max_bytes} bytes")
            if held > _SMALL_BODY_BYTES and self._held > _BODIES_HELD * self._max_bytes:
                raise Overloaded(f"{self._held >> 20} MiB of other requests are worked on", 1)
            return message

        try:
            refusal = self._refusal(scope["method"], scope["path"], headers)
            if refusal:
                client = headers.get(CLIENT_HEADER.encode(), b"").decode("latin-1")
                body = error_body(scope["path"], *refusal, client)
                answer = JsonReply(body, refusal[0], _SAID_WITH.get(refusal[0]))
                await answer(scope, receive, note_and_send)
            else:
                await self._app(_as_get(scope), count_and_receive, note_and_send)
        except Exception:
            status = 500
            raise
        finally:
            self._held -= held
            seconds = time.perf_counter() - start
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.note_request(route, status, seconds)
            if self._log:
                self._log.write(scope, request_id.decode("latin-1"), status, seconds)

    def _refusal(self, method: str, path: str, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_bytes:
            return 413, f"body: more than {self._max_bytes} bytes"
        return self._access.refusal(method, path, headers)


def _as_get(scope: Scope) -> Scope:
    """Return a HEAD request as GET: what writes the answer leaves its body out."""
    return {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope


_READ = {b"authorization", b"content-length", b"host", b"x-api-key", b"x-request-id", CLIENT_HEADER.encode()}
_ALWAYS = (
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", b"frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
)
"""No page of others shows ours in a frame, and nothing is taken for another type."""
_SAID_WITH = {401: {"www-authenticate": "Bearer"}, 413: {"connection": "close"}}  # the body is not read


class JsonRoute(APIRoute):
    """A route whose endpoint takes `(body, caller)`; one without a `body` is served by FastAPI.

    The body is JSON whatever its type says (`curl -d` says another), checked once, and the answer is sent as
    the endpoint made it: dependencies and exit stacks would cost as much as a search.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        hints = get_type_hints(endpoint, include_extras=True)
        self._model: type[BaseModel] | None = hints.get("body")
        self._caller_of = hints["caller"].__metadata__[0].dependency if self._model else None

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; errors are answered by `errors.answer_error`."""
        if self._model is None or scope["method"] not in (self.methods or ()):
            return await super().handle(scope, receive, send)
        request = Request(scope, receive)
        body = await self.read(request)
        answer = await self.endpoint(body, await self._caller_of(request))  # pyright: ignore[reportOptionalCall]
        await answer(scope, receive, send)

    async def read(self, request: Request) -> BaseModel:
        assert self._model is not None
        try:
            content = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"body: not JSON ({error})") from error
        return parse_body(self._model, content)


def parse_body(model: type[BaseModel], content: Any) -> Any:
    """Return the content as the model, or raise what says which field is wrong."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


class RequestLog:
    """A JSON line a request, appended to a file; several processes may share it. No query texts."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise ConfigError(f"request_log {path}: {error.strerror}") from error

    def write(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        """Add the line; a full disk stops the log, not the server."""
        line = {
            "time": round(time.time(), 3),
            "request_id": request_id,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 6),
            **scope["facts"],
        }
        with contextlib.suppress(OSError):
            self._file.write(json.dumps(line).encode() + b"\n")
