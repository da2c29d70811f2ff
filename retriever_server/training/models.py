"""Model builders: what a recipe's `model.class_path` names, and what takes `(base, **options)`.

Each gives a model of sentence-transformers. `base` is a hub name, a folder, a GGUF file (or a folder
that holds one), or `{config: ..., corpus: ...}` for a tiny random model (`tiny.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from data.errors import ConfigError
from data.hub import find_model
from data.packaged import converted_gguf
from retriever_server.encoders.loading import limit_tokens

logger = logging.getLogger(__name__)

Base = str | dict[str, Any]
"""Where the weights and the tokenizer come from, see above."""


def resolve_base(base: Base) -> str:
    """What `from_pretrained` loads: a hub name or folder as it is, the others made or converted once."""
    found = check_base(base)
    if isinstance(base, Mapping):
        from retriever_server.training.tiny import tiny_base

        return tiny_base(**base)
    return str(converted_gguf(Path(found))) if found.endswith(".gguf") else found


def check_base(base: Any) -> str:
    """Where a base lies, nothing loaded or made yet; "" for a tiny one. Raises ConfigError."""
    if isinstance(base, Mapping):
        if not {"config"} <= set(base) <= {"config", "corpus", "vocabulary", "seed", "folder"}:
            raise ConfigError(
                f"base: got {', '.join(map(str, base))}; needs config, corpus; may have vocabulary, seed"
            )
        return ""
    if not isinstance(base, str):
        raise ConfigError(f"base = {base!r}: must be a name, a folder, or a mapping of config and corpus")
    path = Path(base).expanduser()
    ggufs = [path] if path.is_file() and path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    return str(ggufs[0]) if ggufs and not (path / "config.json").exists() else find_model(base, "base")


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
    from sentence_transformers import SentenceTransformer

    modules = _tower(base, pooling, pool_prompt, max_tokens, dtype, normalise)
    return _assemble(SentenceTransformer, modules, query_prompt, passage_prompt, _similarity(normalise))


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
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router

    towers = [
        _tower(each, pooling, True, max_tokens, dtype, normalise) for each in (base, passage_base or base)
    ]
    router = Router.for_query_document(query_modules=towers[0], document_modules=towers[1])
    return _assemble(SentenceTransformer, [router], query_prompt, passage_prompt, _similarity(normalise))


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
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.modules import Router, SparseStaticEmbedding, SpladePooling

    transformer = _transformer(base, max_tokens, dtype, transformer_task="fill-mask")
    modules: list[Any] = [transformer, SpladePooling(pooling)]
    if inference_free:
        bag = SparseStaticEmbedding(tokenizer=transformer.tokenizer)
        modules = [Router.for_query_document(query_modules=[bag], document_modules=modules)]
    model = _assemble(SparseEncoder, modules, "", "", "dot")
    model.max_active_dims = max_active
    return model


def colbert(
    base: Base,
    dimension: int | None = 128,
    query_tokens: int | None = 32,
    passage_tokens: int = 180,
    attend_to_expansion: bool = False,
    query_prompt: str = "[unused0] ",
    passage_prompt: str = "[unused1] ",
    skip_punctuation: bool = True,
    dtype: str = "float32",
) -> Any:
    """ColBERT: a vector of `dimension` a token, scored by MaxSim (Khattab and Zaharia 2020).

    Queries are filled up with mask tokens to `query_tokens`, or left as they are if it is None; passages are
    cut at `passage_tokens`, and their punctuation is not kept. dimension: None leaves the vectors of the
    base as wide as they are, without a projection that must be learned.
    """
    import string

    import torch
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Normalize
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from tokenizers import AddedToken

    filled: Any = {"strategy": "fixed", "length": query_tokens, "attend": attend_to_expansion}
    expansion = filled if query_tokens else None
    transformer = _transformer(
        base, None, dtype, query_expansion=expansion, query_length=query_tokens,
        document_length=passage_tokens,
    )  # fmt: skip
    known = transformer.tokenizer.get_vocab()
    # A vocabulary without BERT's spare words has no markers.
    prompts = [
        "" if text.startswith("[unused") and text.strip() not in known else text
        for text in (query_prompt, passage_prompt)
    ]
    markers = [text.strip() for text in prompts if text.strip() in known]
    whole = [AddedToken(each, normalized=False, special=True) for each in markers]  # or it falls to pieces
    transformer.tokenizer.add_tokens(whole, special_tokens=True)
    width = transformer.get_embedding_dimension()
    project: list[Any] = [] if dimension is None else [Dense(
        width, dimension, bias=False, module_input_name="token_embeddings",
        activation_function=torch.nn.Identity(),
    )]  # fmt: skip
    skipped = [sign for sign in string.punctuation if sign in known] if skip_punctuation else None
    modules: list[Any] = [transformer, *project, MultiVectorMask(skipped), Normalize("token_embeddings")]
    return _assemble(MultiVectorEncoder, modules, prompts[0], prompts[1], None)


def cross_encoder(base: Base, max_tokens: int | None = None, dtype: str = "float32") -> Any:
    """A reranker that reads query and passage together and gives one number."""
    from sentence_transformers import CrossEncoder

    model = _load(
        base, lambda name: CrossEncoder(name, num_labels=1, device="cpu", model_kwargs={"dtype": dtype})
    )
    limit_tokens(model, max_tokens)
    return model


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
    from retriever_server.encoders.loading import load_model

    model = load_model(base, kind, "cpu", dtype)
    for role, prompt in (("query", query_prompt), ("document", passage_prompt)):
        if prompt is not None:
            model.prompts[role] = prompt
    limit_tokens(model, max_tokens)
    return model


def _tower(
    base: Base, pooling: str, pool_prompt: bool, max_tokens: int | None, dtype: str, normalise: bool
) -> list[Any]:
    from sentence_transformers.base.modules import Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling

    if pooling not in Pooling.POOLING_MODES:
        raise ConfigError(f"pooling {pooling!r}: must be one of {', '.join(Pooling.POOLING_MODES)}")
    transformer = _transformer(base, max_tokens, dtype)
    pool: Any = Pooling(transformer.get_embedding_dimension(), pooling, pool_prompt)  # type: ignore[arg-type]
    return [transformer, pool, *([Normalize()] if normalise else [])]


def _transformer(base: Base, max_tokens: int | None, dtype: str, **options: Any) -> Any:
    from sentence_transformers.base.modules import Transformer

    options["model_kwargs"] = {"dtype": dtype, **options.get("model_kwargs", {})}
    transformer = _load(base, lambda name: Transformer(name, **options))
    if "modality_config" not in options and set(transformer.modality_config) == {"text", "message"}:
        transformer.modality_config.pop("message")  # or every text would be put into the chat template
    limit_tokens(transformer, max_tokens)
    return transformer


def _load(base: Base, load: Any) -> Any:
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()  # no table of heads that are not needed
    name = resolve_base(base)
    try:
        return load(name)
    except (ImportError, OSError, ValueError) as error:  # a processor may need what we do not: torchvision
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"base {name!r}: no model loads from there ({reason})") from error


def _assemble(of: Any, modules: list[Any], query: str, passage: str, similarity: str | None) -> Any:
    prompts = {"query": query, "document": passage}
    named = {"similarity_fn_name": similarity} if similarity else {}
    return of(modules=modules, prompts=prompts, device="cpu", **named)


def _similarity(normalise: bool) -> str:
    return "cosine" if normalise else "dot"
