"""Models that sentence-transformers has saved, trained further."""

from __future__ import annotations

from typing import Any, Literal

from data.models.hub import find_model
from retriever_server.encoders.checks import limit_tokens
from retriever_server.encoders.loading import load_model


def pretrained(
    base: str,
    kind: Literal["dense", "sparse", "multi", "cross"] | None = None,
    query_prompt: str | None = None,
    passage_prompt: str | None = None,
    max_tokens: int | None = None,
    dtype: str = "float32",
) -> Any:
    """A model that sentence-transformers has saved, to be trained further, its modules as they are.

    kind: read from the folder if not given. Prompts that are not given stay as they were saved.
    """
    model = load_model(find_model(base, "base"), kind, "cpu", dtype)
    for role, prompt in (("query", query_prompt), ("document", passage_prompt)):
        if prompt is not None:
            model.prompts[role] = prompt
    limit_tokens(model, max_tokens)
    return model
