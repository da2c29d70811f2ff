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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data.errors import ConfigError
from retriever_server.batching import Batching

_log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 300
"""A trainer asks again after its update: a connection closed meanwhile would break under its request."""
_GRACE_SECONDS = 30
"""For requests in flight at a stop."""
_LAST_SECONDS = 2
"""For all else at a stop: a search that hangs in its thread is not waited for."""


@dataclass(frozen=True)
class ServeConfig:
    """Serve a retriever until SIGTERM or Ctrl-C; requests in flight are finished first.

    After SIGTERM /readyz says 503 while searches go on for `drain_seconds`; Ctrl-C does not wait for that.
    SIGHUP opens again what lies at the places of the retrievers, as POST /admin/reload does.
    """

    index: str
    """Folder of an index, made by `sleuth index`; a YAML file of retrievers; or a server's URL."""
    others: dict[str, str] = field(default_factory=dict)
    """More retrievers beside it, by name, for clients that name a backend."""
    host: str = "127.0.0.1"
    """Address to listen on. The default is seen by this machine only."""
    port: int = 8000
    """0 takes a free one."""
    port_file: str | None = None
    """File to write the port into once the server listens."""
    workers: int = 1
    """Processes that share the port and the memory map; a dead one is replaced."""
    token_file: str | None = None
    """File with a token that every request but probes must carry, as Authorization: Bearer or X-API-Key."""
    admin_token_file: str | None = None
    """File with another token, for administration; without it the one of token_file administers."""
    allowed_hosts: list[str] = field(default_factory=list)
    """Names under which it may be asked without a token, beside addresses, localhost and its host."""
    image_folders: list[str] = field(default_factory=list)
    """Folders of pictures that may be shown, beside the folder of their corpus."""
    dialect: str = "rllm"
    """How to answer what two projects' clients ask alike: rllm, zerosearch, search-r1, skyrl, asearcher."""
    topk: int = 3
    """Passages a query where the client does not say."""
    max_topk: int = 100
    """The most that a client may ask for."""
    max_queries: int = 100_000
    """The most queries in one request; they are searched in pieces."""
    max_hits: int = 300_000
    """The most hits in one answer: queries times passages a query."""
    max_query_chars: int = 8192
    """The longest query."""
    max_body_bytes: int = 8 << 20
    """The largest request."""
    max_deadline_seconds: int = 60
    """The longest that a request may take."""
    max_images: int = 16
    """The most images in one request."""
    max_image_bytes: int = 4 << 20
    """The largest image, as a file."""
    max_image_pixels: int = 20_000_000
    """The largest image, width times height."""
    batching: Batching = field(default_factory=Batching)
    """How the queries of different requests travel together."""
    watch_seconds: float = 1.0
    """How often to look for a new generation at the places of the retrievers; 0: never."""
    drain_seconds: float = 2.0
    """How long SIGTERM leaves others to see at /readyz that this server goes, before it refuses requests."""
    request_log: str | None = None
    """File to which a JSON line a request is appended."""
    mcp: Literal["off", "http", "stdio"] = "off"
    """The Model Context Protocol: at /mcp beside the rest, or on stdin and stdout instead of it."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"workers = {self.workers}: must be >= 1")
        for name in ("watch_seconds", "drain_seconds"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} = {getattr(self, name)}: must be >= 0")
        for folder in self.image_folders:
            if not Path(folder).is_dir():
                raise ConfigError(f"image_folders: {folder}: no such folder")
        if "default" in self.others:
            raise ConfigError("others: `default` is the name of the retriever that index gives")


def main(config: ServeConfig) -> None:
    """Serve a retriever until SIGTERM or Ctrl-C; requests in flight are finished first."""
    if config.mcp == "stdio":
        return _speak_mcp(config)
    if config.port:
        _listen(config.host, config.port).close()  # whether it is free, before anything is opened
    app = build_app(config)  # with several workers too: what does not open is refused here, in one line
    opened = app.state.service.default.current
    manifest = getattr(opened.retriever, "manifest", None)
    served = f"{manifest.corpus_count:,} passages ({opened.generation})" if manifest else opened.generation
    with _listen(config.host, config.port) as listener:
        address, port = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        if config.port_file is not None:
            from data.jsonl import atomic_write

            atomic_write(config.port_file, f"{port}\n")
        print(f"serving {served} at http://{shown}:{port}", flush=True)
        if config.workers == 1:
            _run_until_stopped(app, listener, config.drain_seconds)
        else:
            del app, opened
            _run_workers(config, listener)


def build_app(config: ServeConfig) -> Any:
    """The application, its retrievers opened; SIGHUP reloads them."""
    from retriever_server.app import create_app
    from retriever_server.guard import read_token

    token = read_token(config.token_file) if config.token_file else None
    admin = config.admin_token_file
    admin_token = read_token(admin, "admin_token_file") if admin else None
    app = create_app(
        _open_backends(config),
        _limits(config),
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


def build_worker(config: ServeConfig) -> Any:
    """The application of one of several processes, which does not outlive the process that started it."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()
    return _drain_first(build_app(config), config.drain_seconds)


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


def _limits(config: ServeConfig) -> Any:
    from retriever_server.service import Limits

    return Limits(
        config.topk,
        config.max_topk,
        config.max_queries,
        config.max_hits,
        config.max_query_chars,
        config.max_body_bytes,
        config.max_deadline_seconds,
        config.max_images,
        config.max_image_bytes,
        config.max_image_pixels,
    )


def _open_backends(config: ServeConfig) -> dict[str, Any]:
    from retriever_server.live import Live, stamp
    from retriever_server.opening import check_retriever, open_retriever

    for spec in (config.index, *config.others.values()):
        check_retriever(spec)

    def opened(spec: str) -> Any:
        retriever = open_retriever(spec)
        retriever.probe()
        return retriever

    def live(spec: str) -> Live:
        reopen = functools.partial(opened, spec)
        return Live(reopen(), reopen, functools.partial(stamp, spec))

    return {name: live(spec) for name, spec in {"default": config.index, **config.others}.items()}


def _reload(app: Any) -> None:
    for name in app.state.service.backends:
        try:
            app.state.service.reload(name)
        except Exception as error:
            _log.error("%s not swapped: %s", name, error)


def _reload_siblings() -> None:
    os.kill(os.getppid(), signal.SIGHUP)


def _speak_mcp(config: ServeConfig) -> None:
    from retriever_server.adapters import make_mcp
    from retriever_server.service import Service

    make_mcp(Service(_open_backends(config), _limits(config), config.batching)).run("stdio")


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


def _run_until_stopped(app: Any, listener: socket.socket, drain_seconds: float) -> None:
    import uvicorn

    config = uvicorn.Config(
        functools.partial(_drain_first, app, drain_seconds),  # called when uvicorn's handlers are set
        factory=True,
        log_level="warning",
        timeout_graceful_shutdown=_GRACE_SECONDS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    if threading.current_thread() is threading.main_thread():
        # uvicorn raises the signal again once it has stopped; being asked to stop is no failure.
        for stop in (signal.SIGTERM, signal.SIGINT):
            signal.signal(stop, _leave)
    uvicorn.Server(config).run(sockets=[listener])


def _run_workers(config: ServeConfig, listener: socket.socket) -> None:
    import uvicorn
    from uvicorn.supervisors import Multiprocess

    from retriever_server.metrics import forget_process, share_metrics

    class Workers(Multiprocess):
        def keep_subprocess_alive(self) -> None:
            before = {process.pid for process in self.processes}
            super().keep_subprocess_alive()
            for pid in before - {process.pid for process in self.processes}:
                forget_process(pid or 0)

        def handle_hup(self) -> None:
            for process in self.processes:
                os.kill(process.pid or os.getpid(), signal.SIGHUP)

    settings = uvicorn.Config(
        functools.partial(build_worker, config),
        factory=True,
        log_level="warning",
        timeout_graceful_shutdown=_GRACE_SECONDS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_worker_healthcheck=60,
        workers=config.workers,
    )
    with share_metrics():
        Workers(settings, [listener]).run()
