"""A test whether anybody listens at a URL: made before anything slow, and of the port alone."""

from __future__ import annotations

import socket
import time
from urllib.parse import urlsplit

PROBE_SECONDS = 3.0
"""Time to wait at the start of a command for a server that does not listen yet."""


def why_silent(url: str) -> str:
    """The reason why nobody can be connected to at a URL within PROBE_SECONDS; "" where somebody can.

    http://127.0.0.1:9 -> "Connection refused"
    """
    parts = urlsplit(url)
    try:
        port = parts.port or {"https": 443}.get(parts.scheme, 80)
    except ValueError:
        return "invalid port"
    until = time.monotonic() + PROBE_SECONDS
    while True:
        try:
            socket.create_connection((parts.hostname or "", port), max(0.1, until - time.monotonic())).close()
            return ""
        except socket.gaierror as error:
            return str(error.strerror)  # asking again does not make a name known
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
        if time.monotonic() + 0.2 > until:
            return reason
        time.sleep(0.2)
