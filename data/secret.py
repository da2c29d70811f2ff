"""Keys and tokens out of files: command lines and recipes are seen and kept."""

from __future__ import annotations

from pathlib import Path

from data.errors import ConfigError


def read_secret(path: str | Path, option: str, first_line: bool = False) -> str:
    """Return the one word in a file, or on its first line; ConfigError names the option and the file."""
    try:
        text = Path(path).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {path}: {getattr(error, 'strerror', None) or 'not ASCII'}") from None
    words = (text.partition("\n")[0] if first_line else text).split()
    if len(words) != 1:
        raise ConfigError(f"{option} {path}: must hold one word, a token or key")
    return words[0]
