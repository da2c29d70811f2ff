"""`sleuth serve`: retrievers over HTTP, in the dialects of other projects' clients, or over MCP."""

from __future__ import annotations

import functools
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.text import counted
from retriever_server.server.config import ServeConfig
from scripts.listening import announce, hosts_of, read_token

_log = logging.getLogger(__name__)


def main(config: ServeConfig) -> None:
    """Serve a retriever until SIGTERM or Ctrl-C; requests in flight are finished first."""
    if config.mcp == "stdio":
        return _speak_mcp(config)
    from retriever_server.server.connections import listen, run_until_stopped

    if config.port:
        listen(config.host, config.port).close()  # whether it is free, before anything is opened
    start = time.monotonic()
    app = build_app(config)  # with several workers too: what does not open is refused here, in one line
    lease = app.state.service.backend().current
    manifest = getattr(lease.retriever, "manifest", None)
    count = counted(manifest.corpus_count, "passage") if manifest else ""
    served = f"{count} ({lease.generation})" if manifest else lease.generation
    opened_seconds = time.monotonic() - start
    with listen(config.host, config.port) as listener:
        announce_it = functools.partial(announce, config, listener.getsockname(), served)
        if config.workers == 1:
            announce_it()
            run_until_stopped(app, listener, config)
        else:
            del app, lease
            _run_workers(config, listener, opened_seconds, announce_it)


def build_app(config: ServeConfig) -> Any:
    """Return the application, its retrievers opened; SIGHUP reloads them."""
    from retriever_server.server.app import create_app

    app = create_app(
        _open_backends(config),
        config,
        batching=config.batching,
        dialect=config.dialect,
        token=read_token(config.token_file, "token_file"),
        admin_token=read_token(config.admin_token_file, "admin_token_file"),
        hosts=hosts_of(config),
        image_folders=config.image_folders,
        request_log=Path(config.request_log) if config.request_log else None,
        watch_seconds=config.watch_seconds,
        with_mcp=config.mcp == "http",
        on_reload=(lambda: os.kill(os.getppid(), signal.SIGHUP)) if config.workers > 1 else lambda: None,
    )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=_reload, args=[app]).start())
    return app


def _open_backends(config: ServeConfig) -> dict[str, Any]:
    from retriever_server.open_retriever import check_retriever, open_retriever
    from retriever_server.server.backends import HotSwappable, stamp

    for spec in (config.index, *config.others.values()):
        check_retriever(spec)

    def opened(spec: str) -> Any:
        retriever = open_retriever(spec)
        retriever.probe()
        return retriever

    def live(spec: str) -> HotSwappable:
        reopen = functools.partial(opened, spec)
        return HotSwappable(reopen(), reopen, functools.partial(stamp, spec))

    return {name: live(spec) for name, spec in {"default": config.index, **config.others}.items()}


def _reload(app: Any) -> None:
    for name, backend in app.state.service.backends.items():
        try:
            backend.reload()
        except Exception as error:
            _log.error("%s not swapped: %s", name, error)


def _speak_mcp(config: ServeConfig) -> None:
    from retriever_server.server.routes.mcp import make_mcp
    from retriever_server.server.service import SearchService

    make_mcp(SearchService(_open_backends(config), config, config.batching)).run("stdio")


def _run_workers(
    config: ServeConfig, listener: socket.socket, opened_seconds: float, announce: Callable[[], None]
) -> None:
    from retriever_server.server.connections import GRACE_SECONDS, LAST_SECONDS
    from retriever_server.server.metrics import share_metrics
    from retriever_server.server.workers import Workers

    with share_metrics():
        Workers(
            config.workers,
            _work,
            config,
            start_seconds=60 + 20 * opened_seconds,
            silent_seconds=max(60, 2 * config.max_deadline_seconds),
            stop_seconds=config.drain_seconds + GRACE_SECONDS + 2 * LAST_SECONDS,
        ).run(listener, announce)


def _work(config: ServeConfig, listener: socket.socket, pulse: Any) -> None:
    from retriever_server.server.connections import run_until_stopped
    from retriever_server.server.workers import begin_work

    run_until_stopped(begin_work(functools.partial(build_app, config), pulse), listener, config, pulse)
