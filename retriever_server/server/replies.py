"""Answers in JSON, written fast: what was found is neither copied nor validated once more."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from starlette.exceptions import HTTPException
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


def list_models(names: Sequence[str]) -> dict[str, Any]:
    """Return the list of models, as OpenAI has it."""
    data = [{"id": name, "object": "model", "created": 0, "owned_by": "sleuth"} for name in names]
    return {"object": "list", "data": data}


def find_model(names: Sequence[str], name: str) -> dict[str, Any]:
    """Return the one of that name out of the list. Raises HTTPException with 404."""
    if name not in names:
        raise HTTPException(404, f"model {name[:80]!r}: there is {', '.join(names) or 'none'}")
    return list_models([name])["data"][0]


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
