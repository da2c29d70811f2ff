"""Connections of a server, bounded and timed: what uvicorn leaves open for as long as its clients like.

A request has `stall_seconds` for its head; its body, and later the answer, must move on by `LEAST_RATE`. Who
waits for an answer, or is idle between two requests, is left alone. What is closed is counted in the log.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_log = logging.getLogger(__name__)

LEAST_RATE = 1024
"""Bytes a second of a body, or of an answer that is more than the machine holds for its client."""
_MOST_OPEN_FILES = 1 << 16
_RESERVED_FILES = 128
"""For what a request opens."""
_LONGEST_HEAD = 1 << 16
_MOST_PIPELINED = 32
_TOLD_EVERY_SECONDS = 5.0


def raise_open_files() -> int:
    """Allow this process, and those it starts, as many open files as the system lets it; how many."""
    try:
        import resource
    except ImportError:  # Windows
        return _MOST_OPEN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = _MOST_OPEN_FILES if hard == unlimited else min(hard, _MOST_OPEN_FILES)
    if soft != unlimited and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return _MOST_OPEN_FILES if soft == unlimited else soft


def connections_for(open_files: int) -> int:
    """How many connections leave room for the files of another generation beside this one."""
    try:
        held = len(os.listdir("/proc/self/fd"))
    except OSError:
        held = _RESERVED_FILES
    return max(1, open_files - 2 * held - _RESERVED_FILES)


class Bounds:
    """What the connections of one process may do; it tells the log what became of those that did more."""

    def __init__(self, most: int, stall_seconds: float) -> None:
        self.most, self.stall_seconds = most, stall_seconds
        self._closed: Counter[str] = Counter()

    def note(self, loop: asyncio.AbstractEventLoop, why: str) -> None:
        """A connection was closed; the log is told within seconds, of all at once."""
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
        self._seen: tuple[str, Any] = ("", None)
        """What it did when it was last looked at, and in which request."""
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
        """Look no more."""
        if self._looking is not None:
            self._looking.cancel()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Refuse to hold request after request of a client that does not wait for answers."""
        if len(self.pipeline) >= _MOST_PIPELINED:
            self._bounds.note(self.loop, f"with {_MOST_PIPELINED} requests unanswered")
            raise ValueError("too many requests at once")  # uvicorn answers 400 and closes it
        super().on_message_begin()

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
        """What the client does now: send a head or a body, take an answer; "" where it has nothing to do."""
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
        """Say why it is closed, and close it."""
        if self.transport.is_closing():
            return
        body = b'{"detail": "' + reason + b'"}'
        head = b"HTTP/1.1 " + status + b"\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
        length = b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(head + length + body)
        self.transport.close()
