"""The EncodingSpec of a loaded model of sentence-transformers, and the fingerprint of its weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from data.errors import ConfigError
from data.pages.modalities import kinds
from retriever_server.encoders.spec import EncodingSpec, kind_of_model

DEFAULT_TEMPLATE = "{title}\n{text}"
_DECIDE = (
    "size", "max_image_size", "crop_size", "min_pixels", "max_pixels", "patch_size", "temporal_patch_size",
    "merge_size", "do_image_splitting", "do_resize", "do_center_crop", "do_pad", "do_normalize", "resample",
    "rescale_factor", "image_mean", "image_std", "num_image_tokens", "image_seq_len", "image_seq_length",
)  # fmt: skip
"""Settings of an image processor that decide the pixels and tokens of an image."""
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
    inputs = inputs or next((kind for kind in takes if kind != "text" and "+" not in kind), "text")
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


def outer_transformers(model: Any) -> list[Any]:
    """The models of transformers in one of sentence-transformers: one, or one for each tower."""
    from transformers import PreTrainedModel

    found = [each for each in model.modules() if isinstance(each, PreTrainedModel)]
    inside = {part for each in found for part in each.modules() if part is not each}
    return [each for each in found if each not in inside]


def is_two_way(model: Any) -> bool:
    """Return whether a model of transformers says of itself that it is a decoder with two-way attention."""
    config = getattr(model, "config", None)
    return config is not None and getattr(config.get_text_config(), "is_causal", None) is False


def appends_eos(model: Any) -> bool:
    """Return whether a model of sentence-transformers pools a token that its tokenizer appends."""
    modes = [getattr(module, "pooling_mode", None) for module in model]
    pools_last = any("lasttoken" in ((mode,) if isinstance(mode, str) else mode or ()) for mode in modes)
    return pools_last and last_token(model.tokenizer) is not None


def last_token(tokenizer: Any) -> int | None:
    """The special token that the tokenizer puts behind every text."""
    last = {ids[-1] if ids else None for ids in tokenizer(["a river", "no", ""])["input_ids"]}
    special = last & {*tokenizer.all_special_ids, tokenizer.pad_token_id} - {None}
    return special.pop() if len(last) == 1 and special else None


def processors(model: Any) -> list[Any]:
    """The processors of a model of sentence-transformers, of both towers where there are two."""
    found = [getattr(module, "processor", None) for module in model.modules()]  # the model itself has one's
    return list({id(processor): processor for processor in found if processor is not None}.values())


def what_it_takes(model: Any) -> tuple[str, ...]:
    """Return what a model encodes: of `kinds()`, such as "text", "image", "text+image"."""
    asked = {kind: tuple(sorted(kind.split("+"))) if "+" in kind else kind for kind in kinds()}
    return tuple(kind for kind, modality in asked.items() if model.supports(modality))


def token_of(processor: Any, of: str = "image") -> str | None:
    """Return the token that stands for an image (a video, a sound) in what a processor makes of it."""
    token = getattr(processor, f"{of}_token", None)
    return getattr(token, "content", token)


def placeholders(model: Any) -> list[str]:
    """The tokens that stand for an image (or a video, a sound) in what the model reads."""
    found = (token_of(each, of) for each in processors(model) for of in ("image", "video", "audio"))
    return [token for token in found if token]


def patch_token(model: Any) -> int | None:
    """The id of the token that a patch of an image has among those of texts; None if there is none."""
    found = [each for each in processors(model) if token_of(each) and hasattr(each, "tokenizer")]
    return int(found[0].tokenizer.convert_tokens_to_ids(token_of(found[0]))) if found else None


def describe_images(model: Any, inputs: str = "image") -> str:
    """The line of an `EncodingSpec` on images: processor, pixels, patches, tokens, template; "" for texts.

    -> 'Idefics3ImageProcessor {"do_resize": true, ..., "size": {"longest_edge": 512}} template 1c5e91a0'
    Where the inputs are of another modality, also what processes these, and all numbers that it knows.
    """
    lines = list(map(_describe_processor, processors(model)))
    if (name := inputs.removeprefix("text+")) not in ("text", "image"):
        lines += [_describe_other(each, name) for each in processors(model)]
    return " + ".join(filter(None, lines))


def _describe_other(processor: Any, modality: str) -> str:
    part = {"audio": "feature_extractor"}.get(modality, f"{modality}_processor")
    part = getattr(processor, part, processor)
    known = part.to_dict() if hasattr(part, "to_dict") and not hasattr(part, "tokenizer") else {}
    known = {name: value for name, value in known.items() if isinstance(value, int | float)}
    return f"{type(part).__name__} {json.dumps(known, sort_keys=True)}" if known else ""


def _describe_processor(processor: Any) -> str:
    images = getattr(processor, "image_processor", processor)
    if "pixel_values" not in getattr(images, "model_input_names", ()):
        return ""
    known = {**images.to_dict(), **{name: getattr(processor, name, None) for name in _DECIDE[-3:]}}
    decide = {name: known[name] for name in _DECIDE if known.get(name) is not None}
    name = type(images).__name__.removesuffix("Pil").removesuffix("Fast")  # whichever library it works with
    line = f"{name} {json.dumps(decide, sort_keys=True, default=int)}"
    if template := getattr(processor, "chat_template", None):
        line += f" template {hashlib.sha256(json.dumps(template).encode()).hexdigest()[:8]}"
    return line
