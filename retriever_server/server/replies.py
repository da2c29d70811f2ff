"""Answers in JSON, written fast: what was found is neither copied nor validated once more."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from data.errors import RetrieverError

LONG_ANSWER = 64
"""Rankings; more are written in a thread, and hold up no other answer."""


class JsonReply(Response):
    """JSON in ASCII: whatever a client sent can be sent back.

    Raises RetrieverError for what is no JSON, such as NaN in the metadata of a passage.
    """

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        try:
            return _render(content).encode()
        except (ValueError, TypeError) as error:
            raise RetrieverError(f"what was found cannot be sent as JSON: {error}") from error


_encode = json.JSONEncoder(allow_nan=False).encode


def _render(content: Any) -> str:
    """Write long JSON in pieces: between them other threads have their turn."""
    if isinstance(content, dict) and any(
        isinstance(each, list) and len(each) > LONG_ANSWER for each in content.values()
    ):
        return f"{{{', '.join(f'{_encode(name)}: {_render(value)}' for name, value in content.items())}}}"
    if isinstance(content, list) and len(content) > LONG_ANSWER:
        return f"[{', '.join(map(_encode, content))}]"
    return _encode(content)
