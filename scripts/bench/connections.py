"""Thousands of clients that keep their connections, beside some that stall: who is answered, who is closed.

    python -m scripts.bench.connections --url http://127.0.0.1:8000 --clients 5000 --slow 1200

clients  ask a query, pause, and ask again on the same connection; any status but 200, and any broken
         connection, is an error
slow     a quarter each: send nothing; a head a byte at a time; a body a byte at a time; ask for megabytes
         and read none of them. They are to be closed, and no client is to notice
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
from collections import Counter
from urllib.parse import urlsplit

from retriever_server.server.connections import raise_open_files
from scripts.bench.server import Client

_CONNECTING_AT_ONCE = 200
_PATIENCE_SECONDS = 120
_BODY = b'{"queries": ["river"], "topk": 3}'
_LARGE = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
"""Queries that are long and cost no search."""
_ENDLESS = b"POST /retrieve HTTP/1.1\r\n" + b"X-Slow: loris\r\n" * 1000
_HEAD = b"POST /retrieve HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"


async def ask_again_and_again(url: str, requests: int, pause: float, gate: asyncio.Semaphore) -> Counter[str]:
    """The outcome of the requests of one client that keeps its connection."""
    client, found = Client(url), Counter[str]()
    for number in range(requests):
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS), contextlib.nullcontext() if number else gate:
                status, _ = await client.ask(_BODY)
            found[str(status)] += 1
        except (OSError, EOFError) as error:  # a time-out, too
            found[type(error).__name__] += 1
        await asyncio.sleep(pause * random.uniform(0.5, 1.5))
    client.close()
    return found


async def stall(url: str, kind: int, gate: asyncio.Semaphore) -> float:
    """Return the seconds that a slow client of this kind kept its connection."""
    parts, start = urlsplit(url), time.monotonic()
    async with gate:
        reader, writer = await asyncio.open_connection(sock=_connected(parts.hostname, parts.port or 80))
    try:
        if kind == 0:
            await reader.read()
        elif kind == 3:
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            for _ in range(30):
                writer.write(_LARGE)
            while not writer.transport.is_closing():
                await asyncio.sleep(1)
                writer.write(b"\r\n")  # what shows that nobody is there
        else:
            for byte in _ENDLESS if kind == 1 else _HEAD % 10_000 + b"x" * 10_000:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(1 if kind == 1 else 0.2)
    except OSError:
        pass
    finally:
        writer.close()
    return time.monotonic() - start


def _connected(host: str | None, port: int) -> socket.socket:
    """A connection whose machine holds next to nothing that is not read."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.connect((host, port))
    made.setblocking(False)
    return made


async def drive(url: str, clients: int, slow: int, requests: int, pause_seconds: float) -> dict[str, object]:
    """The figures, as JSON; slow clients that are still there when the others are done are left."""
    gate, start = asyncio.Semaphore(_CONNECTING_AT_ONCE), time.monotonic()
    stalling = [asyncio.create_task(stall(url, i % 4, gate)) for i in range(slow)]
    asking = (ask_again_and_again(url, requests, pause_seconds, gate) for _ in range(clients))
    answers = sum(await asyncio.gather(*asking), Counter[str]())
    seconds = time.monotonic() - start
    closed = Counter(i % 4 for i, task in enumerate(stalling) if task.done())
    for task in stalling:
        task.cancel()
    await asyncio.gather(*stalling, return_exceptions=True)
    names = ("silent", "head", "body", "unread")
    return {
        "clients": clients,
        "slow": slow,
        "answers": dict(answers),
        "errors": answers.total() - answers["200"],
        "closed": {name: closed[i] for i, name in enumerate(names)},
        "seconds": round(seconds, 1),
    }


def main(
    url: str, clients: int = 5000, slow: int = 1200, requests: int = 6, pause_seconds: float = 10.0
) -> None:
    """Print one JSON line.

    Args:
        url: A server that speaks Search-R1's /retrieve.
        clients: How many keep their connections.
        slow: How many stall beside them.
        requests: Of each client.
        pause_seconds: Between two of them.
    """
    raise_open_files()
    print(json.dumps(asyncio.run(drive(url, clients, slow, requests, pause_seconds))), flush=True)


if __name__ == "__main__":
    from scripts.__main__ import run_script

    run_script(main)
