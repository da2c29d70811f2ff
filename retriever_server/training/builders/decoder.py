"""One vector a text from a decoder: E5-mistral, RepLLaMA, LLM2Vec, Qwen3-Embedding."""

from __future__ import annotations

from typing import Any, Literal

from retriever_server.encoders.checks import append_eos, check_model, make_two_way
from retriever_server.encoders.spec import DENSE
from retriever_server.training.builders.dense import Attention, Base, assemble, load_transformer, pooled


def decoder(
    base: Base,
    pooling: Literal["eos", "mean"] = "eos",
    two_way: bool = False,
    normalise: bool = True,
    query_prompt: str = "",
    passage_prompt: str = "",
    pool_prompt: bool = True,
    eos: str | None = None,
    dropout: float = 0.0,
    max_tokens: int | None = None,
    attention: Attention = "sdpa",
    dtype: str = "float32",
) -> Any:
    """One vector a text from a decoder (Llama, Qwen, Mistral, SmolLM ...), checked to be what is asked for.

    pooling: the vector of an EOS token, appended after truncation (E5-mistral, RepLLaMA, Qwen3-Embedding),
    or the mean of all (LLM2Vec). two_way: tokens attend to those after them. pool_prompt: whether the
    prompt counts in the mean. eos: another token than the tokenizer's own. dropout: of attention, while
    it trains (unsupervised SimCSE lives by it). Raises ConfigError, DataError if a check fails.
    """
    kernels: Any = {"attn_implementation": attention}
    transformer = load_transformer(
        base, max_tokens, dtype, model_kwargs=kernels, config_kwargs={"attention_dropout": dropout}
    )
    if two_way:
        make_two_way(transformer.model)
    tokenizer = transformer.tokenizer
    if pooling == "eos":
        append_eos(tokenizer, eos)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    modules = pooled(transformer, "lasttoken" if pooling == "eos" else "mean", normalise, pool_prompt)
    model = assemble(DENSE, modules, query_prompt, passage_prompt, normalise)
    check_model(model)
    return model
