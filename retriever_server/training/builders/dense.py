"""One vector a text, from an encoder, DPR's two, or a decoder, and the parts that all builders share.

A builder takes `(base, **options)`; a recipe's `model.class_path` names it. `base` is a hub name, a folder, a
GGUF file (or a folder that holds one), or `{config: ..., corpus: ...}` for a tiny random model (`tiny.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from data.errors import ConfigError
from data.models.hub import find_model
from retriever_server.encoders.checks import append_eos, check_model, limit_tokens, make_two_way
from retriever_server.encoders.spec import DENSE, Kind

Base = str | dict[str, Any]
"""Source of the weights and the tokenizer, see above."""
Attention = Literal["sdpa", "eager", "flash_attention_2"]


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


def check_base(base: Any, key: str = "base") -> str:
    """Return where a base lies, nothing loaded or made yet; "" for a tiny one. ConfigError names the key."""
    if isinstance(base, Mapping):
        if not {"config"} <= set(base) <= {"config", "corpus", "vocabulary", "seed", "folder"}:
            raise ConfigError(
                f"{key}: got {', '.join(map(str, base))}; needs config, corpus; may have vocabulary, seed"
            )
        return ""
    if not isinstance(base, str):
        raise ConfigError(f"{key} = {base!r}: must be a name, a folder, or a mapping of config and corpus")
    path = Path(base).expanduser()
    ggufs = [path] if path.is_file() and path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    return str(ggufs[0]) if ggufs and not (path / "config.json").exists() else find_model(base, key)


def resolve_base(base: Base) -> str:
    """Return what `from_pretrained` loads; a tiny model is made, and a GGUF file converted, once."""
    found = check_base(base)
    if isinstance(base, Mapping):
        from retriever_server.training.builders.tiny import tiny_base

        return tiny_base(**base)
    if not found.endswith(".gguf"):
        return found
    from data.models.packaged import converted_gguf

    return str(converted_gguf(Path(found)))


def load_base(base: Base, load: Any) -> Any:
    """Return what `load` makes of the name of a base. Raises ConfigError."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()  # no table of heads that are not needed
    name = resolve_base(base)
    try:
        return load(name)
    except (ImportError, OSError, ValueError) as error:  # a processor may need what we do not: torchvision
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"base {name!r}: no model loads from there ({reason})") from error


def load_transformer(base: Base, max_tokens: int | None, dtype: str, **options: Any) -> Any:
    """The Transformer module of sentence-transformers over a base; options are its own."""
    from sentence_transformers.base.modules import Transformer

    options["model_kwargs"] = {"dtype": dtype, **options.get("model_kwargs", {})}
    transformer = load_base(base, lambda name: Transformer(name, **options))
    if "modality_config" not in options and set(transformer.modality_config) == {"text", "message"}:
        transformer.modality_config.pop("message")  # or every text would be put into the chat template
    limit_tokens(transformer, max_tokens)
    return transformer


def pooled(transformer: Any, pooling: str, normalise: bool, pool_prompt: bool = True) -> list[Any]:
    """A transformer, the pooling of its vectors, and length 1 if `normalise`. Raises ConfigError."""
    from sentence_transformers.base.modules import Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling

    if pooling not in Pooling.POOLING_MODES:
        raise ConfigError(f"pooling {pooling!r}: must be one of {', '.join(Pooling.POOLING_MODES)}")
    mode: Any = pooling
    pool = Pooling(transformer.get_embedding_dimension(), mode, pool_prompt)
    return [transformer, pool, *([Normalize()] if normalise else [])]


def projection(transformer: Any, dimension: int, of: str = "token_embeddings", bias: bool = False) -> Any:
    """A linear layer from the vectors of a transformer to `dimension`; `of`: the feature it works on."""
    import torch
    from sentence_transformers.base.modules import Dense

    size = transformer.get_embedding_dimension()
    return Dense(size, dimension, bias, torch.nn.Identity(), module_input_name=of)


def assemble(
    kind: Kind, modules: list[Any], query_prompt: str = "", passage_prompt: str = "", normalise: bool = True
) -> Any:
    """A model of sentence-transformers on the CPU; normalise: dense vectors are compared by cosine."""
    prompts = {"query": query_prompt, "document": passage_prompt}
    named = {"dense": "cosine" if normalise else "dot", "sparse": "dot"}.get(kind.name)
    similarity = {"similarity_fn_name": named} if named else {}
    return kind.model_class(modules=modules, prompts=prompts, device="cpu", **similarity)
