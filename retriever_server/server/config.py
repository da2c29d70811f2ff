"""Settings of `sleuth serve`, and the limits of one request."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any, Literal

from data.errors import ConfigError, require, require_range
from retriever_server.server.batching import Batching


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that one request may ask for; more is answered with 4xx."""

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
    """The longest that a request may take; then it gets 504."""
    max_images: int = 16
    """The most images in one request."""
    max_image_bytes: int = 4 << 20
    """The largest image, as a file; in base64 it is a third longer."""
    max_image_pixels: int = 20_000_000
    """The largest image, width times height."""

    def __post_init__(self) -> None:
        require_range(self, "", ">= 1", *(each.name for each in fields(Limits)))
        require(self.topk <= self.max_topk, "topk", self.topk, f"<= max_topk = {self.max_topk}")

    def describe(self) -> dict[str, Any]:
        """Return the limits under their names in `/v1/info`."""
        names = {"topk": "default_top_k", "max_topk": "max_top_k"}
        return {names.get(each.name, each.name): getattr(self, each.name) for each in fields(Limits)}


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Address at which a server listens, to whom, and how it stops."""

    host: str = "127.0.0.1"
    """Address to listen on. The default is seen by this machine only."""
    port: int = 8000
    """0 takes a free one."""
    port_file: str | None = None
    """File to write the port into once the server listens."""
    max_connections: int = 0
    """The most connections of a process; 0: as many as open files allow, of which it asks for more."""
    stall_seconds: float = 30.0
    """Time that a client may take for the head of a request, or send or read next to nothing of the rest."""
    token_file: str | None = None
    """File with a token that every request but probes must carry, as Authorization: Bearer or X-API-Key."""
    allowed_hosts: list[str] = field(default_factory=list)
    """Names under which it may be asked without a token, beside addresses, localhost and its host."""
    drain_seconds: float = 2.0
    """Time after SIGTERM for others to see at /readyz that this server goes, before it refuses requests."""
    request_log: str | None = None
    """File to which a JSON line a request is appended."""

    def __post_init__(self) -> None:
        require_range(self, "", ">= 0", "max_connections")
        require(0 < self.stall_seconds < inf, "stall_seconds", self.stall_seconds, "> 0")
        require(0 <= self.drain_seconds < inf, "drain_seconds", self.drain_seconds, ">= 0")


@dataclass(frozen=True)
class ServeConfig(Limits, Listening):
    """Serve a retriever until SIGTERM or Ctrl-C; requests in flight are finished first.

    After SIGTERM /readyz says 503 while searches go on for `drain_seconds`; Ctrl-C does not wait for that.
    SIGHUP opens again what lies at the places of the retrievers, as POST /admin/reload does.
    """

    index: str
    """Folder of an index, made by `sleuth index`; a YAML file of retrievers; or a server's URL."""
    others: dict[str, str] = field(default_factory=dict)
    """More retrievers beside it, by name, for clients that name a backend."""
    workers: int = 1
    """Processes that share the port and the memory map; a dead one is replaced."""
    admin_token_file: str | None = None
    """File with another token, for administration; without it the one of token_file administers."""
    image_folders: list[str] = field(default_factory=list)
    """Folders of pictures that may be shown, beside the folder of their corpus."""
    dialect: str = "rllm"
    """Dialect of answers to what two projects ask alike: rllm, zerosearch, search-r1, skyrl, asearcher."""
    batching: Batching = field(default_factory=Batching)
    """Batching of the queries of different requests."""
    watch_seconds: float = 1.0
    """Interval of looking for a new generation at the places of the retrievers; 0: never."""
    mcp: Literal["off", "http", "stdio"] = "off"
    """The Model Context Protocol: at /mcp beside the rest, or on stdin and stdout instead of it."""

    def __post_init__(self) -> None:
        Limits.__post_init__(self)
        Listening.__post_init__(self)
        require_range(self, "", ">= 1", "workers")
        require(0 <= self.watch_seconds < inf, "watch_seconds", self.watch_seconds, ">= 0")
        for folder in self.image_folders:
            if not Path(folder).is_dir():
                raise ConfigError(f"image_folders: {folder}: no such folder")
        if "default" in self.others:
            raise ConfigError("others: `default` is the name of the retriever that index gives")
