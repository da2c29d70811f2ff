"""`sleuth serve`: retrievers over HTTP, in the dialects of other projects' clients, or over MCP."""

from __future__ import annotations

import functools
import logging
import multiprocessing.connection
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.errors import ConfigError, SleuthError
from retriever_server.server.config import ServeConfig

_log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 300
"""A trainer asks again after its update: a connection closed meanwhile would break under its request."""
_GRACE_SECONDS = 30
"""For requests in flight at a stop."""
_BACKLOG = 4096
"""Clients that may stand at the door."""
_LAST_SECONDS = 2
"""For all else at a stop: a search that hangs in its thread is not waited for."""


def main(config: ServeConfig) -> None:
    """Serve a retriever until SIGTERM or Ctrl-C; requests in flight are finished first."""
    if config.mcp == "stdio":
        return _speak_mcp(config)
    if config.port:
        _listen(config.host, config.port).close()  # whether it is free, before anything is opened
    start = time.monotonic()
    app = build_app(config)  # with several workers too: what does not open is refused here, in one line
    opened = app.state.service.backend(None).current
    manifest = getattr(opened.retriever, "manifest", None)
    served = f"{manifest.corpus_count:,} passages ({opened.generation})" if manifest else opened.generation
    opened_seconds = time.monotonic() - start
    with _listen(config.host, config.port) as listener:
        announce = functools.partial(_announce, config, listener.getsockname(), served)
        if config.workers == 1:
            announce()
            _run_until_stopped(app, listener, config)
        else:
            del app, opened
            _run_workers(config, listener, opened_seconds, announce)


def _announce(config: ServeConfig, address: tuple[Any, ...], served: str) -> None:
    host, port = address[:2]
    if config.port_file is not None:
        from data.jsonl import atomic_write

        atomic_write(config.port_file, f"{port}\n")
    print(f"serving {served} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)


def build_app(config: ServeConfig) -> Any:
    """The application, its retrievers opened; SIGHUP reloads them."""
    from retriever_server.server.app import create_app
    from retriever_server.server.middleware import read_token

    token = read_token(config.token_file) if config.token_file else None
    admin = config.admin_token_file
    admin_token = read_token(admin, "admin_token_file") if admin else None
    app = create_app(
        _open_backends(config),
        config,
        batching=config.batching,
        dialect=config.dialect,
        token=token,
        admin_token=admin_token,
        hosts=_names(config),
        image_folders=config.image_folders,
        request_log=Path(config.request_log) if config.request_log else None,
        watch_seconds=config.watch_seconds,
        with_mcp=config.mcp == "http",
        on_reload=_reload_siblings if config.workers > 1 else lambda: None,
    )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=_reload, args=[app]).start())
    return app


def _names(config: ServeConfig) -> set[str]:
    """What this server goes by; a machine that listens on all its addresses goes by its name, too."""
    own = socket.gethostname() if config.host in ("", "0.0.0.0", "::") else config.host
    return {name.lower().rstrip(".") for name in (own, *config.allowed_hosts)}


def _drain_first(app: Any, seconds: float) -> Any:
    """The application; SIGTERM from now on makes it unready at once, and uvicorn stop `seconds` later."""
    service, stop = app.state.service, signal.getsignal(signal.SIGTERM)

    def drain(*signal_and_frame: Any) -> None:
        if not service.stopping and callable(stop):
            service.stopping = True
            _later(seconds, stop, *signal_and_frame)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, drain)
    return app


def _leave(*_: Any) -> None:
    _later(_LAST_SECONDS, os._exit, 0)
    sys.exit(0)


def _later(seconds: float, act: Callable[..., object], *arguments: Any) -> None:
    timer = threading.Timer(seconds, act, arguments)
    timer.daemon = True
    timer.start()


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
    for name in app.state.service.backends:
        try:
            app.state.service.backend(name).reload()
        except Exception as error:
            _log.error("%s not swapped: %s", name, error)


def _reload_siblings() -> None:
    os.kill(os.getppid(), signal.SIGHUP)


def _speak_mcp(config: ServeConfig) -> None:
    from retriever_server.server.routes.mcp import make_mcp
    from retriever_server.server.service import SearchService

    make_mcp(SearchService(_open_backends(config), config, config.batching)).run("stdio")


def _listen(host: str, port: int) -> socket.socket:
    """A socket that already queues connections, so that who reads the port may call at once."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"port = {port}: must be from 0 to 65535")
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


def _run_until_stopped(app: Any, listener: socket.socket, config: ServeConfig, pulse: Any = None) -> None:
    """Serve in this process; `pulse` is told every second that it is well, or not that it is not."""
    import uvicorn

    from retriever_server.server.connections import BoundedProtocol, Bounds, connections_for, raise_open_files

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
        timeout_graceful_shutdown=_GRACE_SECONDS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_notify=0,  # that is, every second
        callback_notify=look,
    )
    if threading.current_thread() is threading.main_thread():
        # uvicorn raises the signal again once it has stopped; being asked to stop is no failure.
        for stop in (signal.SIGTERM, signal.SIGINT):
            signal.signal(stop, _leave)
    uvicorn.Server(settings).run(sockets=[listener])


def _run_workers(
    config: ServeConfig, listener: socket.socket, opened_seconds: float, announce: Callable[[], None]
) -> None:
    from retriever_server.server.metrics import share_metrics
    from retriever_server.server.workers import Workers

    with share_metrics():
        Workers(
            config.workers,
            _work,
            config,
            start_seconds=60 + 20 * opened_seconds,
            silent_seconds=max(60, 2 * config.max_deadline_seconds),
            stop_seconds=config.drain_seconds + _GRACE_SECONDS + 2 * _LAST_SECONDS,
        ).run(listener, announce)


def _work(config: ServeConfig, listener: socket.socket, pulse: Any) -> None:
    """One of several processes, which does not outlive the one that started it."""
    for early in (signal.SIGINT, signal.SIGHUP):
        signal.signal(early, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()
    try:
        app = build_app(config)
    except Exception as error:
        pulse.complain(f"{'' if isinstance(error, SleuthError) else f'{type(error).__name__}: '}{error}")
        os._exit(1)
    _run_until_stopped(app, listener, config, pulse)
