"""Options that the servers' commands share: host, port and tokens."""

from __future__ import annotations

import socket
from typing import Any

from data.atomic import atomic_write
from data.secret import read_secret
from retriever_server.server.config import Listening


def announce(config: Listening, address: tuple[Any, ...], served: str) -> None:
    """Write the port into its file, and print where what is served."""
    host, port = address[:2]
    if config.port_file is not None:
        atomic_write(config.port_file, f"{port}\n")
    print(f"serving {served} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)


def read_token(file: str | None, option: str) -> str | None:
    """Return the token in the file of an option, None without one; ConfigError where it holds none."""
    return read_secret(file, option) if file else None


def hosts_of(config: Listening) -> set[str]:
    """Return the names that the server goes by."""
    # A machine that listens on all its addresses goes by its name.
    own = socket.gethostname() if config.host in ("", "0.0.0.0", "::") else config.host
    return {name.lower().rstrip(".") for name in (own, *config.allowed_hosts)}
