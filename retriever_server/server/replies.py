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
        """Write the JSON."""
        try:
            return _render(content).encode()
        except (ValueError, TypeError) as error:
            raise RetrieverError(f"what was found cannot be sent as JSON: {error}") from error


def _render(content: Any) -> str:
    """Write JSON in pieces: between them other threads have their turn."""
    if isinstance(content, dict):
        fields = (f"{json.dumps(name)}: {_render(value)}" for name, value in content.items())
        return f"{{{', '.join(fields)}}}"
    if isinstance(content, list):
        return f"[{', '.join([json.dumps(item, allow_nan=False) for item in content])}]"
    return json.dumps(content, allow_nan=False)
