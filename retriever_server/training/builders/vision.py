"""Pages as images: DSE, GME and ColPali from a vision-language model, and two small towers.

An item may be a text, an image, or (not with two towers) both together.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from sentence_transformers.base.modules import Normalize, Router
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

from data.errors import ConfigError
from retriever_server.encoders.checks import append_eos
from retriever_server.encoders.patches import PatchMask
from retriever_server.encoders.read_spec import patch_token, token_of
from retriever_server.encoders.spec import DENSE, MULTI
from retriever_server.training.builders.dense import (
    Attention,
    Base,
    assemble,
    load_transformer,
    pooled,
    projection,
)

_PICTURES = {
    model_type: "<|vision_start|><|image_pad|><|vision_end|>"
    for model_type in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
}
"""Text that stands for an image where it is more than the image token of the processor."""
Template = Literal["plain", "own"]


def dse(
    base: Base,
    pooling: Literal["eos", "mean"] = "eos",
    normalise: bool = True,
    query_prompt: str = "",
    passage_prompt: str = "What is shown in this image?",
    template: Template = "plain",
    images: dict[str, Any] | None = None,
    eos: str | None = None,
    max_tokens: int | None = None,
    attention: Attention = "sdpa",
    dtype: str = "float32",
) -> Any:
    """One vector an item from a vision-language model: the EOS token behind it (Ma et al. 2024, DSE).

    template: plain puts images first, then the prompt and the text (so that a text that is too long is cut,
    and no image); own is the chat template of the model. images: what of its image processor differs, such
    as {size: {longest_edge: 512}}. Raises ConfigError for a model that reads no images.
    """
    transformer = _vision_language(base, template, images, 0, eos, max_tokens, attention, dtype)
    modules = pooled(transformer, "lasttoken" if pooling == "eos" else pooling, normalise)
    return assemble(DENSE, modules, query_prompt, passage_prompt, normalise)


def gme(
    base: Base,
    instruction: str = "Find a page that answers the question.",
    images: dict[str, Any] | None = None,
    template: Template = "plain",
    max_tokens: int | None = None,
    attention: Attention = "sdpa",
    dtype: str = "float32",
) -> Any:
    """One space for texts, images and both together; `instruction` on the query (Zhang et al. 2024, GME)."""
    return dse(
        base, "eos", True, f"{instruction} " if instruction else "", "", template, images,
        max_tokens=max_tokens, attention=attention, dtype=dtype,
    )  # fmt: skip


def colpali(
    base: Base,
    dimension: int = 128,
    augmentation: int = 10,
    only_patches: bool = False,
    query_prompt: str = "",
    passage_prompt: str = "",
    template: Template = "plain",
    images: dict[str, Any] | None = None,
    max_tokens: int | None = None,
    attention: Attention = "sdpa",
    dtype: str = "float32",
) -> Any:
    """A vector of `dimension` a token and patch, scored by MaxSim (Faysse et al. 2024, ColPali).

    augmentation: so many EOS tokens behind every query (template plain). only_patches: of a passage with
    an image nothing else is kept; where passages are texts, too, they would have no vectors.
    """
    transformer = _vision_language(
        base, template, images, augmentation, None, max_tokens, attention, dtype, appended=False
    )
    kept: Any = [patch_token(transformer)] if only_patches else None
    mask = MultiVectorMask(keep_only_token_ids=kept)
    modules = [transformer, projection(transformer, dimension), mask, Normalize("token_embeddings")]
    return assemble(MULTI, modules, query_prompt, passage_prompt)


def two_tower_pages(
    base: Base,
    image_base: Base,
    vectors: Literal["one", "many"] = "one",
    dimension: int = 128,
    text_pooling: str = "mean",
    image_pooling: str = "mean",
    query_prompt: str = "",
    max_tokens: int | None = None,
    dtype: str = "float32",
) -> Any:
    """A text tower and a vision tower (ViT, SigLIP's, ...) that meet in `dimension`: small DSE or ColPali.

    vectors: one a text and image, of length 1; or many, one a token and patch, scored by MaxSim. An item
    that is an image and a text has no tower. Raises ConfigError for an image_base that reads none.
    """
    text, image = load_transformer(base, max_tokens, dtype), load_transformer(image_base, None, dtype)
    if "image" not in image.modality_config:
        raise ConfigError(f"image_base: a {image.config.model_type} model reads no images")
    many = vectors == "many"
    towers = {
        name: _late_tower(each, dimension)
        if many
        else [*pooled(each, pooling, False), projection(each, dimension, "sentence_embedding", bias=True)]
        for name, each, pooling in (("text", text, text_pooling), ("image", image, image_pooling))
    }
    router = Router(towers, route_mappings={(None, name): name for name in towers})
    modules = [router, Normalize("token_embeddings") if many else Normalize()]
    return assemble(MULTI if many else DENSE, modules, query_prompt)


def _late_tower(transformer: Any, dimension: int) -> list[Any]:
    reads_text = "text" in transformer.modality_config
    return [transformer, projection(transformer, dimension), MultiVectorMask() if reads_text else PatchMask()]


def _vision_language(
    base: Base,
    template: Template,
    images: dict[str, Any] | None,
    augmentation: int,
    eos: str | None,
    max_tokens: int | None,
    attention: Attention,
    dtype: str,
    appended: bool = True,
) -> Any:
    """The transformer of a vision-language model with its template; `appended`: EOS behind every item."""
    transformer = load_transformer(base, max_tokens, dtype, model_kwargs={"attn_implementation": attention})
    processor, tokenizer = transformer.processor, transformer.tokenizer
    if not {"image", "message"} <= set(transformer.modality_config):
        raise ConfigError(f"base: a {transformer.config.model_type} model reads no images beside texts")
    if images:
        processor.image_processor = type(processor.image_processor).from_dict(
            {**processor.image_processor.to_dict(), **images}
        )
    tokenizer.padding_side = "right"
    if appended:
        append_eos(tokenizer, eos)
    if template == "plain":
        if (token := token_of(processor)) is None:
            raise ConfigError(f"base: {type(processor).__name__} has no image token; use template: own")
        picture = _PICTURES.get(transformer.config.model_type, token)
        processor.chat_template = plain_template(picture, token, tokenizer.eos_token, augmentation)
        transformer.input_formatter.message_format = "structured"
    return transformer


def plain_template(picture: str, token: str, eos: str, augmentation: int = 0) -> str:
    """A chat template that writes a conversation's images, then its texts, and nothing around them.

    picture: what is written for an image; token: its image token, which texts cannot name. Behind a query
    come `augmentation` tokens `eos`.
    """
    parts = "{%- for message in messages if message.content is not string -%}{%- for part in message.content "
    shown = f"if part.type == 'image' -%}}{{{{- {json.dumps(picture)} -}}}}{{%- endfor -%}}{{%- endfor -%}}"
    said = (
        "{%- for message in messages -%}{%- if message.content is string -%}"
        f"{{{{- message.content | replace({json.dumps(token)}, '') -}}}}{{%- else -%}}"
        "{%- for part in message.content if part.type == 'text' -%}"
        f"{{{{- part.text | replace({json.dumps(token)}, '') -}}}}"
        "{%- endfor -%}{%- endif -%}{%- endfor -%}"
    )
    behind = f"{{%- if task == 'query' -%}}{{{{- {json.dumps(eos * augmentation)} -}}}}{{%- endif -%}}"
    return parts + shown + said + (behind if augmentation else "")
