"""Serve an application with uvicorn, its connections bounded and timed, until a signal stops it.

A request has `stall_seconds` for its head; its body, and later the answer, must move on by `LEAST_RATE`. Who
waits for an answer, or is idle between two requests, is left alone. What is closed is counted in the log.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import resource
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from data.errors import ConfigError, require
from retriever_server.server.config import Listening

_log = logging.getLogger(__name__)

LEAST_RATE = 1024
"""Bytes a second of a body, or of an answer that is more than the machine holds for its client."""
KEEP_ALIVE_SECONDS = 300
"""A trainer asks again after its update: a connection closed meanwhile would break under its request."""
GRACE_SECONDS = 30
"""For requests in flight at a stop."""
LAST_SECONDS = 2
"""For all else at a stop: a search that hangs in its thread is not waited for."""
_BACKLOG = 4096
"""Clients that may stand at the door."""
_MOST_OPEN_FILES = 1 << 16
_RESERVED_FILES = 128
"""For what a request opens."""
_LONGEST_HEAD = 1 << 16
_MOST_PIPELINED = 32
_TOLD_EVERY_SECONDS = 5.0


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that already queues connections, so that who reads the port may call at once."""
    require(0 <= port <= 65535, "port", port, "from 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        # A name that does not resolve has a negative errno and words of its own.
        number = error.errno or 0
        reason = os.strerror(number) if number > 0 else error.strerror
        raise ConfigError(
            f"cannot listen on {host}:{port}: {reason}; give another --port, or 0 for a free one"
        ) from error
    # asyncio does not set it on connections of a ready-made listener: 40 ms an answer without it.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def run_until_stopped(app: FastAPI, listener: socket.socket, config: Listening, pulse: Any = None) -> None:
    """Serve in this process; `pulse` is told every second that it is well, or not that it is not."""
    most = config.max_connections or connections_for(raise_open_files())
    _log.info("at most %d connections", most)

    async def look() -> None:
        if app.state.service.check_health() and pulse is not None:
            pulse.beat()

    settings = uvicorn.Config(
        functools.partial(_drain_first, app, config.drain_seconds),  # called when uvicorn's handlers are set
        factory=True,
        http=functools.partial(BoundedProtocol, Bounds(most, config.stall_seconds)),  # type: ignore[arg-type]
        ws="none",
        log_level="warning",
        backlog=_BACKLOG,
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_notify=0,  # that is, every second
        callback_notify=look,
    )
    # uvicorn raises the signal again once it has stopped; being asked to stop is no failure.
    for stop in (signal.SIGTERM, signal.SIGINT):
        _handle(stop, _leave)
    uvicorn.Server(settings).run(sockets=[listener])


def _handle(signal_number: int, act: Callable[..., object]) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal_number, act)


def _drain_first(app: FastAPI, seconds: float) -> FastAPI:
    """Have SIGTERM make the application unready at once, and uvicorn stop `seconds` later."""
    service, stop = app.state.service, signal.getsignal(signal.SIGTERM)

    def drain(*signal_and_frame: Any) -> None:
        if not service.stopping and callable(stop):
            service.stopping = True
            _later(seconds, stop, *signal_and_frame)

    _handle(signal.SIGTERM, drain)
    return app


def _leave(*_: Any) -> None:
    _later(LAST_SECONDS, os._exit, 0)
    sys.exit(0)


def _later(seconds: float, act: Callable[..., object], *arguments: Any) -> None:
    timer = threading.Timer(seconds, act, arguments)
    timer.daemon = True
    timer.start()


def raise_open_files() -> int:
    """Allow this process and its children as many open files as the system does; return how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = _MOST_OPEN_FILES if hard == unlimited else min(hard, _MOST_OPEN_FILES)
    if soft != unlimited and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return _MOST_OPEN_FILES if soft == unlimited else soft


def connections_for(open_files: int) -> int:
    """Return how many connections leave room for the files of another generation beside this one."""
    try:
        held = len(os.listdir("/proc/self/fd"))
    except OSError:
        held = _RESERVED_FILES
    return max(1, open_files - 2 * held - _RESERVED_FILES)


class Bounds:
    """Limits of the connections of one process; tells the log how many were closed, and why."""

    def __init__(self, most: int, stall_seconds: float) -> None:
        self.most, self.stall_seconds = most, stall_seconds
        self._closed: Counter[str] = Counter()

    def note(self, loop: asyncio.AbstractEventLoop, why: str) -> None:
        """Count a closed connection; the log is told within seconds, of all at once."""
        if not self._closed:
            loop.call_later(_TOLD_EVERY_SECONDS, self._tell)
        self._closed[why] += 1

    def _tell(self) -> None:
        counts = ", ".join(f"{count} {why}" for why, count in self._closed.items())
        _log.warning("closed connections: %s", counts)
        self._closed.clear()


class BoundedProtocol(HttpToolsProtocol):
    """One connection; `functools.partial(BoundedProtocol, bounds)` is uvicorn's `http`."""

    def __init__(self, bounds: Bounds, **given: Any) -> None:
        super().__init__(**given)
        self._bounds = bounds
        self._refused, self._received, self._head = False, 0, 0
        self._cycles: list[Any] = []
        """Requests that are not answered yet."""
        self._seen: tuple[str, Any] = ("", None)
        """Progress of the client at the last look, and in which request."""
        self._since, self._moved = 0.0, 0
        """Since when it does that, or moves too slowly, and how far it had come then."""
        self._looking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take it, or where there are too many refuse what it asks."""
        super().connection_made(transport)
        if len(self.connections) > self._bounds.most:
            self._refused = True
            self._bounds.note(self.loop, f"beyond {self._bounds.most}")
            if len(self.connections) > self._bounds.most + _RESERVED_FILES // 2:
                return transport.abort()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._looking is not None:
            self._looking.cancel()
        for cycle in self._cycles:  # uvicorn tells the last one alone that its client has gone
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Refuse to hold request after request of a client that does not wait for answers."""
        if len(self.pipeline) >= _MOST_PIPELINED:
            self._bounds.note(self.loop, f"with {_MOST_PIPELINED} requests unanswered")
            raise ValueError("too many requests at once")  # uvicorn answers 400 and closes it
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Begin a request, or let it wait for those before it."""
        super().on_headers_complete()
        self._cycles = [each for each in (*self._cycles, self.cycle) if not each.response_complete]

    def data_received(self, data: bytes) -> None:
        """Read on, unless it is refused or its head never ends."""
        if self._refused:
            return self._answer(b"503 Service Unavailable", b"too many connections; try again in 1 s")
        self._received += len(data)
        super().data_received(data)
        self._head = self._head + len(data) if self._doing() == "head" else 0
        if self._head > _LONGEST_HEAD:
            self._bounds.note(self.loop, "with a head without end")
            self._answer(b"431 Request Header Fields Too Large", b"the head of the request is too large")

    def _doing(self) -> str:
        """Return what the client does now: send a head or a body, take an answer; "" for nothing."""
        if self.transport.get_write_buffer_size():
            return "answer"
        if self.cycle is None or self.cycle.response_complete:
            return "" if self.timeout_keep_alive_task else "head"
        return "body" if self.cycle.more_body and not self.flow.read_paused else ""

    def _look(self) -> None:
        """Close it if it has stalled; else look again."""
        now, patience, doing = self.loop.time(), self._bounds.stall_seconds, self._doing()
        moved = -self.transport.get_write_buffer_size() if doing == "answer" else self._received
        waited = now - self._since
        if (doing, self.cycle) != self._seen:
            self._seen, self._since, self._moved = (doing, self.cycle), now, moved
        elif doing and waited >= patience:
            if doing == "head" or self._refused or moved - self._moved < LEAST_RATE * waited:
                return self._give_up(doing)
            self._since, self._moved = now, moved
        self._looking = self.loop.call_later(patience / 4, self._look)

    def _give_up(self, doing: str) -> None:
        self._bounds.note(self.loop, f"stalled in the {doing}")
        if doing == "answer":
            return self.transport.abort()
        self._answer(b"408 Request Timeout", b"the request did not come in time")

    def _answer(self, status: bytes, reason: bytes) -> None:
        if self.transport.is_closing():
            return
        body = b'{"detail": "' + reason + b'"}'
        head = b"HTTP/1.1 " + status + b"\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
        length = b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(head + length + body)
        self.transport.close()
