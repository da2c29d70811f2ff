"""A connection to a Ray cluster, or to one that is made here for as long as this process lives."""

from __future__ import annotations

import logging
import os
import signal
import socket
from typing import Any

from data.errors import ConfigError


def connect_ray(address: str, cpus: float | None = None) -> Any:
    """The module `ray`, connected to `local` (made here, with so many CPUs), auto or HOST:PORT.

    Raises ConfigError without Ray or a cluster.
    """
    host, colon, port = address.rpartition(":")
    if ("://" in address or not (colon and port.isdecimal())) and address not in ("local", "auto"):
        raise ConfigError(f"--ray {address}: must be local, auto or HOST:PORT of a cluster's head")
    stop = signal.getsignal(signal.SIGTERM)
    try:
        if colon:  # Ray itself would try for a minute
            socket.create_connection((host, int(port)), timeout=10).close()
        import ray  # pyright: ignore[reportMissingImports]  (an extra)

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers of the cluster
        os.environ.setdefault("RAY_worker_niceness", "0")  # else what a cluster made here does is background
        options: dict[str, Any] = {"num_cpus": cpus} if address == "local" and cpus else {}
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING, **options)
    except ModuleNotFoundError as error:
        raise ConfigError(f"--ray {address}: needs Ray: pip install 'sleuth-rl[ray]'") from error
    except (OSError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        hint = "; one with a token is asked with RAY_AUTH_MODE=token" if "connect to Ray" in reason else ""
        raise ConfigError(f"--ray {address}: no Ray cluster answers there ({reason}){hint}") from error
    if stop is not None:
        signal.signal(signal.SIGTERM, stop)  # Ray has put its own there, which ends at once
    return ray
