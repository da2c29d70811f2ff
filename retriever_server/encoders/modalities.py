"""What an item is made of, and how each part of it is opened for a model: the one place that lists them.

Another modality (audio, video) is a field of `data.records.Item` and a line in `READERS`, under the name that
sentence-transformers has for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from data.images import read_image
from data.records import Input

READERS: dict[str, Callable[[Any], Any]] = {"image": read_image}
"""Field of an item -> what opens it: a file or bytes in, what a processor takes out."""


def modality_of(item: Input) -> str:
    """What an item is made of.   -> "text", "image" or "image+text" """
    if isinstance(item, str):
        return "text"
    parts = [name for name in (*READERS, "text") if getattr(item, name, None)]
    return "+".join(parts) or "text"


def opened(item: Input) -> dict[str, Any]:
    """What a multimodal model of sentence-transformers takes: {"image": picture, "text": ...}.

    Never a bare string, which it would open or fetch where it looks like a path or a URL. The text comes
    last: it is what a tokenizer may cut. Raises DataError for what cannot be read.
    """
    if isinstance(item, str):
        return {"text": item}
    parts = {name: read(getattr(item, name)) for name, read in READERS.items() if getattr(item, name, None)}
    return {**parts, "text": item.text} if item.text or not parts else parts
