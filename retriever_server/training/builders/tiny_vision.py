"""Tiny random models that read images, for tests and benchmarks: a vision tower, a vision-language model.

The tower is a ViT of any image and patch shape; the language model is shaped as Idefics3 and SmolVLM are.
Both come with the image processor of transformers that does with Pillow alone, without torchvision.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    ViTConfig,
    ViTModel,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from data.errors import ConfigError

IMAGE, AROUND, WHOLE, END = "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"
_SIDE, _PATCH = 64, 8
_CHAT = (
    "{% for message in messages %}{{ message.role | capitalize }}: {% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}<image>"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
)


def write_vit(settings: Mapping[str, Any], seed: int, folder: Path) -> None:
    """Put a random ViT and its image processor into `folder`.

    settings: of ViTConfig; image_size and patch_size are a side or [height, width], by default 64 and 8;
    image_mean and image_std, of three channels, are the processor's, by default .5.
    Every image is stretched to image_size. Raises ConfigError where patches do not fill it.
    """
    sizes = {"image_size": _SIDE, "patch_size": _PATCH}
    pixels = {name: settings.get(name, value) for name, value in _PIXELS.items()}
    config = ViTConfig(**{**sizes, **{name: value for name, value in settings.items() if name not in pixels}})
    (height, width), patch = _pair(config.image_size), _pair(config.patch_size)
    _check_filled((height, width), patch)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ViTModel(config).save_pretrained(folder)
    processor = ViTImageProcessorPil(size={"height": height, "width": width}, **pixels)
    processor.save_pretrained(folder)


def write_vlm(settings: Mapping[str, Any], tokenizer: Any, seed: int, folder: Path) -> None:
    """Put a random Idefics3 and its processor with that tokenizer into `folder`.

    settings: text_config, vision_config (its image_size and patch_size are sides, by default 64 and 8) and
    scale_factor (2): an image becomes (image_size / patch_size / scale_factor) ** 2 tokens. It is stretched
    to a square and not split. What else is there goes into both configurations. Raises ConfigError where
    patches do not fill the image.
    """
    tokenizer.add_special_tokens({"additional_special_tokens": [AROUND, IMAGE, END, WHOLE]})
    both = {key: value for key, value in settings.items() if key not in _OWN}
    vision = {"image_size": _SIDE, "patch_size": _PATCH, **both, **settings.get("vision_config", {})}
    text = {**both, "max_position_embeddings": 2048, **settings.get("text_config", {})}
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos")}
    scale, side = settings.get("scale_factor", 2), vision["image_size"]
    _check_filled(_pair(side), _pair(vision["patch_size"] * scale))
    config = Idefics3Config(
        text_config={**ids, **text, "vocab_size": len(tokenizer)},
        vision_config=vision,
        scale_factor=scale,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.model_max_length = text["max_position_embeddings"]
    images = Idefics3ImageProcessorPil(
        do_image_splitting=False,
        size={"longest_edge": side},
        max_image_size={"longest_edge": side},
        **_PIXELS,
    )
    tokens = (side // vision["patch_size"] // scale) ** 2
    Idefics3Processor(images, tokenizer, image_seq_len=tokens, chat_template=_CHAT).save_pretrained(folder)


_OWN = ("text_config", "vision_config", "scale_factor")
_PIXELS: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _check_filled(image: tuple[int, int], patch: tuple[int, int]) -> None:
    if any(side % part or side < part for side, part in zip(image, patch, strict=True)):
        raise ConfigError(f"config: image_size {image}: must be multiples of the patches, {patch}")
