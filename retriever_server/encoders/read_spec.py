"""The EncodingSpec of a loaded model of sentence-transformers, and the fingerprint of its weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from data.errors import ConfigError
from data.modalities import modalities
from retriever_server.encoders.checks import appends_eos, is_two_way, outer_transformers
from retriever_server.encoders.image_inputs import describe_images, what_it_takes
from retriever_server.encoders.kinds import kind_of_model
from retriever_server.encoders.spec import EncodingSpec

DEFAULT_TEMPLATE = "{title}\n{text}"
_PASSAGE_PROMPTS = ("document", "passage", "corpus")  # the order of sentence-transformers


def read_spec(
    name: str, model: Any, passage_template: str = DEFAULT_TEMPLATE, inputs: str | None = None
) -> EncodingSpec:
    """Return what a loaded model of sentence-transformers says of itself, as the spec that will serve.

    inputs: what of a passage is encoded; None: the image where the model reads images, else what it reads
    of the first other modality that is registered, else the text.
    Raises ConfigError for a similarity that no index has, and for inputs that the model does not take.
    """
    kind = kind_of_model(model).name
    similarity = model.similarity_fn_name
    if similarity not in ("cosine", "dot", "maxsim"):
        raise ConfigError(f"encoder {name!r}: similarity {similarity!r}; supported: cosine, dot, maxsim")
    takes = what_it_takes(model)
    inputs = inputs or next((name for name in modalities() if name in takes), "text")
    if inputs not in takes:
        allowed = ", ".join(sorted(takes))
        raise ConfigError(f"encoder {name!r}: inputs {inputs!r}: this model encodes {allowed}")
    saved_prompts = [model.prompts[key] for key in _PASSAGE_PROMPTS if key in model.prompts]
    modules = [*describe_first(model), *_describe(list(model), getattr(model, "max_active_dims", None))]
    return EncodingSpec(
        model=str(name),
        kind=kind,
        fingerprint=fingerprint(model),
        dimension=_dimension(model, kind),
        query_prompt=model.prompts.get("query") or "",
        passage_prompt=next(iter(saved_prompts), "") or "",
        passage_template=passage_template,
        max_tokens=model.max_seq_length,
        pooling=" > ".join(modules),
        normalise=(kind == "dense" and similarity == "cosine") or _ends_normalised(model),
        similarity=similarity,
        inputs=inputs,
        image_processor=describe_images(model, inputs),
    )


def _dimension(model: Any, kind: str) -> int:
    if kind == "sparse":  # what it says of itself is right only after its first text
        return int(model.encode(["a text"], show_progress_bar=False).shape[1])
    return int(getattr(model, "truncate_dim", None) or model.get_embedding_dimension())


def describe_first(model: Any) -> list[str]:
    """Describe the first module: its own pooling, "two-way" attention, an "eos" that is pooled."""
    own = type(model[0]).__name__ if getattr(model[0], "pooling_mode", None) else ""
    says = [f"{own}({model[0].pooling_mode})"] if own else []
    two_way = any(map(is_two_way, outer_transformers(model)))
    return says + ["two-way"] * two_way + ["eos"] * appends_eos(model)


def _describe(modules: list[Any], limit: int | None = None) -> list[str]:
    """The modules after the transformer, of both towers where there are two; how many entries are kept."""
    kept = [f"largest {limit}"] if limit else []
    parts = [_describe_module(module) for module in modules[1:]]
    if routes := getattr(modules[0], "sub_modules", None):
        inner = [f"{name}: {' > '.join(map(_describe_module, tower))}" for name, tower in routes.items()]
        parts.insert(0, f"({'; '.join(inner)})")
    return parts + kept


def _describe_module(module: Any) -> str:
    names = ("pooling_mode", "pooling_strategy", "pool_factor")  # the last one of token pooling
    mode = next(filter(None, (getattr(module, name, None) for name in names)), None)
    if getattr(module, "keep_only_token_ids", None):
        mode = "patches alone"
    if mode and not getattr(module, "include_prompt", True):
        mode = f"{mode}, without prompt"
    return type(module).__name__ + (f"({mode})" if mode else "")


def _ends_normalised(model: Any) -> bool:
    return type(list(model)[-1]).__name__ == "Normalize" and getattr(model, "truncate_dim", None) is None


def fingerprint(model: Any) -> str:
    """Short hash of at most 256 values of each weight, rounded to bfloat16, and of the vocabulary."""
    import torch

    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 256)].to(torch.bfloat16).float().cpu()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + sample.numpy().tobytes())
    vocabulary = getattr(model.tokenizer, "get_vocab", dict)()
    digest.update(json.dumps(sorted(vocabulary.items())).encode())
    return digest.hexdigest()[:16]
