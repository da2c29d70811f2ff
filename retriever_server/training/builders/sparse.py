"""Learned sparse vectors over the vocabulary: SPLADE, uniCOIL and DeepImpact."""

from __future__ import annotations

from typing import Any, Literal

import torch
from sentence_transformers.sparse_encoder.modules import Router, SparseStaticEmbedding, SpladePooling

from retriever_server.encoders.spec import SPARSE
from retriever_server.encoders.token_weights import TokenWeights
from retriever_server.training.builders.dense import Base, assemble, load_transformer


def splade(
    base: Base,
    pooling: Literal["max", "sum"] = "max",
    inference_free: bool = False,
    max_tokens: int | None = None,
    max_active: int | None = None,
    dtype: str = "float32",
) -> Any:
    """SPLADE: weights of all words of the vocabulary from the masked language model's logits.

    pooling: over tokens, max (v2) or sum (v1). inference_free: a query is the learned weights of its own
    words, without a transformer. max_active: words kept of a text when it is encoded.
    """
    transformer = load_transformer(base, max_tokens, dtype, transformer_task="fill-mask")
    modules: list[Any] = [transformer, SpladePooling(pooling)]
    if inference_free:
        bag = SparseStaticEmbedding(tokenizer=transformer.tokenizer)
        modules = [Router.for_query_document(query_modules=[bag], document_modules=modules)]
    model = assemble(SPARSE, modules)
    model.max_active_dims = max_active
    return model


def unicoil(base: Base, max_tokens: int | None = None, dtype: str = "float32") -> Any:
    """uniCOIL: one weight a token by a linear layer, for queries and passages (Lin and Ma 2021).

    Passages may be expanded before (`expansion.py`): nothing that is not in a text gets a weight.
    """
    return assemble(SPARSE, _weighed(base, max_tokens, dtype))


def deepimpact(base: Base, layers: int = 2, max_tokens: int | None = None, dtype: str = "float32") -> Any:
    """DeepImpact: an MLP's weight of each piece of the passage at its first occurrence (Mallia et al. 2021).

    A query is the set of its pieces, each of weight 1, without a transformer. The paper's terms are
    words, ours are the tokenizer's word pieces.
    """
    weighed = _weighed(base, max_tokens, dtype, layers=layers, occurrence="first")
    tokenizer = weighed[0].tokenizer
    ones = torch.ones(len(tokenizer))
    ones[tokenizer.all_special_ids] = 0
    query = SparseStaticEmbedding(tokenizer=tokenizer, weight=ones, frozen=True)
    router = Router.for_query_document(query_modules=[query], document_modules=weighed)
    return assemble(SPARSE, [router])


def _weighed(base: Base, max_tokens: int | None, dtype: str, **options: Any) -> list[Any]:
    transformer = load_transformer(base, max_tokens, dtype)
    size, vocabulary = transformer.get_embedding_dimension(), len(transformer.tokenizer)
    return [transformer, TokenWeights(size, vocabulary, **options)]
