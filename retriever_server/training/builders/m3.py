"""BGE-M3: dense, sparse and multi-vector heads on one transformer (Chen et al. 2024).

What was trained loads as a dense encoder; beside it lie three, dense, sparse and multi (`M3Heads.parts`),
for three indexes whose rankings `Fuse` joins.
"""

from __future__ import annotations

from typing import Any

from data.errors import ConfigError
from retriever_server.encoders.m3 import M3Heads
from retriever_server.encoders.spec import DENSE
from retriever_server.training.builders.dense import Base, assemble, load_transformer


def m3(base: Base, dimension: int = 128, max_tokens: int | None = None, dtype: str = "float32") -> Any:
    """One transformer with the three heads; `dimension` of the vectors of tokens."""
    transformer = load_transformer(base, max_tokens, dtype)
    if transformer.tokenizer.padding_side == "left" or transformer.tokenizer.cls_token is None:
        raise ConfigError(f"base {base!r}: m3 pools [CLS]; its tokenizer puts none first")
    heads = M3Heads(transformer.get_embedding_dimension(), len(transformer.tokenizer), dimension)
    return assemble(DENSE, [transformer, heads])
