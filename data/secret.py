"""Keys and tokens out of files."""

from __future__ import annotations

from pathlib import Path

from data.errors import ConfigError


def read_secret(path: str) -> str:
    """Return the one line in a file; no option, since command lines and recipes are seen and kept."""
    try:
        secret = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if not secret or not secret.isascii() or not secret.isprintable():
        raise ConfigError(f"{path}: must hold a key or token on one line")
    return secret
