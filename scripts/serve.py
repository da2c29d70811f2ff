"""`sleuth serve`: an index behind Search-R1's `POST /retrieve`."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading

from data.errors import ConfigError


def main(
    index: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    topk: int = 3,
    max_topk: int = 100,
    max_queries: int = 512,
    max_query_chars: int = 8192,
    port_file: str | None = None,
) -> None:
    """Serve an index until SIGTERM or Ctrl-C; requests in flight are finished first.

    Args:
        index: Folder of the index, made by `sleuth index`.
        host: Address to listen on. The default is seen by this machine only; there is no password.
        port: 0 takes a free one.
        topk: Passages a query where the client does not say.
        max_topk: The most that a client may ask for.
        max_queries: The most queries in one request.
        max_query_chars: The longest query.
        port_file: File to write the port into once the server listens.
    """
    from data.jsonl import atomic_write
    from retriever_server.app import Limits, create_app
    from retriever_server.indexes.base import open_index

    limits = Limits(topk, max_topk, max_queries, max_query_chars)
    retriever = open_index(index)
    manifest = retriever.manifest
    info = {
        "kind": manifest.kind,
        "settings": manifest.settings,
        "passages": manifest.corpus_count,
        "corpus_hash": manifest.corpus_hash,
    }
    with _listen(host, port) as listener:
        address, port = listener.getsockname()[:2]
        if port_file is not None:
            atomic_write(port_file, f"{port}\n")
        shown = f"[{address}]" if ":" in address else address
        print(
            f"serving {manifest.corpus_count:,} passages ({retriever.generation}) at http://{shown}:{port}",
            flush=True,
        )
        _run_until_stopped(create_app(retriever, limits, info), listener)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that already queues connections, so that who reads the port may call at once."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"port = {port}: must be from 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
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


def _run_until_stopped(app: object, listener: socket.socket) -> None:
    import uvicorn

    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        log_level="warning",
        timeout_graceful_shutdown=30,
    )
    if threading.current_thread() is threading.main_thread():
        # uvicorn raises the signal again once it has stopped; being asked to stop is no failure.
        for stop in (signal.SIGTERM, signal.SIGINT):
            signal.signal(stop, lambda *_: sys.exit(0))
    uvicorn.Server(config).run(sockets=[listener])
