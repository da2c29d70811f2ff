"""Stands before every request: who may ask, how much may be sent, and one line about what came of it."""

from __future__ import annotations

import contextlib
import hmac
import json
import time
import uuid
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from data.errors import ConfigError
from retriever_server.batching import Overloaded
from retriever_server.metrics import Metrics

OPEN_TO_ALL = {"/", "/healthz", "/readyz", "/health"}
"""Paths that need no token: the page holds no passages, and a probe has no secrets."""


_BODIES_HELD, _SMALL_BODY_BYTES = 32, 1 << 16
"""So many of the largest bodies are held in memory; small ones are always taken."""


class Guard:
    """ASGI middleware: token, size of the body, metrics, request log, `X-Request-ID`."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        token: str | None = None,
        max_body_bytes: int = 8 << 20,
        request_log: Path | None = None,
    ) -> None:
        self._app, self._metrics, self._token, self._max_bytes = app, metrics, token, max_body_bytes
        self._held = 0
        """Bytes of the bodies of all requests that are worked on."""
        self._log = RequestLog(request_log) if request_log else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
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
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        async def count_and_receive() -> Message:
            nonlocal held
            message = await receive()
            size = len(message.get("body", b""))
            held, self._held = held + size, self._held + size
            if held > _SMALL_BODY_BYTES and self._held > _BODIES_HELD * self._max_bytes:
                raise Overloaded(f"{self._held >> 20} MiB of other requests are worked on", 1)
            return message

        try:
            refusal = self._refusal(scope["path"], headers)
            if refusal:
                await _refuse(note_and_send, *refusal)
            else:
                await self._app(scope, count_and_receive, note_and_send)
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

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_bytes:
            return 413, f"body: more than {self._max_bytes} bytes"
        if path.startswith("/admin/") and self._token is None:
            return 403, "administration needs a server with a token (--token_file)"
        if self._token is None or path in OPEN_TO_ALL:
            return None
        given = headers.get(b"authorization", b"")
        if hmac.compare_digest(given, b"Bearer " + self._token.encode()):
            return None
        return 401, "a bearer token is needed: Authorization: Bearer ..."


_READ = {b"authorization", b"content-length", b"x-request-id"}


async def _refuse(send: Send, status: int, reason: str) -> None:
    headers = [(b"content-type", b"application/json")]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 413:
        headers.append((b"connection", b"close"))  # the body is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"detail": reason}).encode()})


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


def read_token(path: str | Path) -> str:
    """The token in a file: its one line. Raises ConfigError."""
    try:
        token = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"token_file {path}: {getattr(error, 'strerror', None) or 'not ASCII'}") from None
    if not token or len(token.split()) != 1:
        raise ConfigError(f"token_file {path}: must hold one word, the token")
    return token
