"""Halves of surrogate pairs: JSON, file names and command lines carry them; UTF-8 and tokenizers cannot."""

from __future__ import annotations

import re
from typing import Any

_ESCAPED_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


def replace_halves(text: str) -> str:
    """Return the text with U+FFFD for each half, as a decoder has it for a broken byte."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def replace_halves_in(value: Any, source: bytes) -> Any:
    """Return a JSON value, parsed from `source`, with the same done to all its strings and keys."""
    return _replaced(value) if _ESCAPED_HALF.search(source) else value


def _replaced(value: Any) -> Any:
    if isinstance(value, str):
        return replace_halves(value)
    if isinstance(value, list):
        return [_replaced(each) for each in value]
    if isinstance(value, dict):
        return {replace_halves(key): _replaced(each) for key, each in value.items()}
    return value
