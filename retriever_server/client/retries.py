"""Common parts of every request: addresses, certificates, which failures may pass, how long to wait."""

from __future__ import annotations

import random
import ssl
from collections.abc import Mapping
from functools import cache
from urllib.parse import urlsplit

from data.errors import ConfigError

FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 0.1, 2.0
_jitter = random.Random()  # its own: no draw here may shift a seeded run


class TryAgain(Exception):
    """A failure that may pass. `after_seconds` if the server said when."""

    def __init__(self, reason: str, after_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.after_seconds = after_seconds


@cache
def certificates() -> ssl.SSLContext:
    """Certificates that a client trusts, read once in a process: it takes longer than many a request."""
    import httpx

    return httpx.create_ssl_context(trust_env=False)


def may_pass(status: int) -> bool:
    """Return whether an answer with this HTTP status may be another one the next time."""
    return status >= 500 or status in (408, 425, 429)


def delay_seconds(failures: int, longest_seconds: float = LONGEST_DELAY_SECONDS) -> float:
    """Return a time that doubles with every failure; half of it is random, lest clients come back in step."""
    longest = min(FIRST_DELAY_SECONDS * 2 ** (failures - 1), longest_seconds)
    return longest * _jitter.uniform(0.5, 1.0)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return a Retry-After header in seconds; None if absent or a date."""
    value = headers.get("retry-after")
    return float(value) if value and value.isdecimal() and value.isascii() else None


def checked_url(url: str | None, given: str, like: str) -> str:
    """Return the URL of a server without the slash at its end; ConfigError "GIVEN: LIKE" for what is none."""
    try:
        parts = urlsplit(url or "")
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        valid = False
    if not url or not valid:
        raise ConfigError(f"{given}: {like}")
    return url.rstrip("/")
