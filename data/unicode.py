"""Halves of surrogate pairs, which JSON, file names and command lines carry, not UTF-8; the Turkish i."""

from __future__ import annotations

import re
from typing import Any

_NO_NAME = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029\ufeff\ud800-\udfff]")
_ESCAPED_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


def replace_halves(text: str) -> str:
    """Return the text with U+FFFD for each half, as a decoder has it for a broken byte."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def name_of(path: str) -> str:
    """Return a path that every table can hold: control characters and bytes that are no UTF-8 escaped."""
    return _NO_NAME.sub(lambda found: ascii(found[0])[1:-1], path)


def one_i(lowered: str) -> str:
    """Turkish has i with and without a dot, and who types without its keyboard writes either as i."""
    return lowered.replace("i\u0307", "i").replace("ı", "i")


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
