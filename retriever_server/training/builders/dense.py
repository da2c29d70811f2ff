"""One vector a text from an encoder: a single transformer, or DPR's two."""

from __future__ import annotations

from typing import Any

from retriever_server.encoders.kinds import DENSE
from retriever_server.training.builders.base import Base, assemble, load_transformer, pooled


def dense(
    base: Base,
    pooling: str = "mean",
    normalise: bool = True,
    query_prompt: str = "",
    passage_prompt: str = "",
    pool_prompt: bool = True,
    max_tokens: int | None = None,
    dtype: str = "float32",
) -> Any:
    """One vector a text: transformer, pooling (mean, cls, lasttoken, ...), and length 1 if `normalise`.

    query_prompt, passage_prompt: put before every text, saved with the model; pool_prompt: whether
    their tokens count in the pooling.
    """
    modules = pooled(load_transformer(base, max_tokens, dtype), pooling, normalise, pool_prompt)
    return assemble(DENSE, modules, query_prompt, passage_prompt, normalise)


def two_towers(
    base: Base,
    passage_base: Base | None = None,
    pooling: str = "cls",
    normalise: bool = False,
    query_prompt: str = "",
    passage_prompt: str = "",
    max_tokens: int | None = None,
    dtype: str = "float32",
) -> Any:
    """DPR: one transformer for queries, another for passages, that start alike (Karpukhin et al. 2020)."""
    from sentence_transformers.base.modules import Router

    query, passage = (
        pooled(load_transformer(each, max_tokens, dtype), pooling, normalise)
        for each in (base, passage_base or base)
    )
    router = Router.for_query_document(query_modules=query, document_modules=passage)
    return assemble(DENSE, [router], query_prompt, passage_prompt, normalise)
