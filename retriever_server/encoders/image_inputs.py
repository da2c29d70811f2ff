"""Images on their way into an encoder: read ahead of it, and wrapped so that no text is taken for one.

sentence-transformers takes a text that looks like a path or URL of an image for that image, and fetches it:
whatever goes into a model that reads images is a mapping that says which is which.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from data.errors import DataError
from data.modalities import modalities, read
from data.records import Input, Item

READERS = max(1, min(4, os.cpu_count() or 1))
"""Threads that read and decode images: Pillow leaves the interpreter to others meanwhile."""

_DECIDE = (
    "size", "max_image_size", "crop_size", "min_pixels", "max_pixels", "patch_size", "temporal_patch_size",
    "merge_size", "do_image_splitting", "do_resize", "do_center_crop", "do_pad", "do_normalize", "resample",
    "rescale_factor", "image_mean", "image_std", "num_image_tokens", "image_seq_len", "image_seq_length",
)  # fmt: skip
"""Settings of an image processor that decide the pixels and tokens of an image."""


def processors(model: Any) -> list[Any]:
    """The processors of a model of sentence-transformers, of both towers where there are two."""
    found = [getattr(module, "processor", None) for module in model.modules()]  # the model itself has one's
    return list({id(processor): processor for processor in found if processor is not None}.values())


def what_it_takes(model: Any) -> frozenset[str]:
    """Return what a model encodes: of `kinds()`, such as "text", "image", "text+image"."""
    known: dict[str, Any] = {"text": "text", **{name: name for name in modalities()}}
    known |= {f"text+{name}": tuple(sorted((name, "text"))) for name in modalities()}
    return frozenset(name for name, modality in known.items() if model.supports(modality))


def reads_files(model: Any) -> bool:
    """Whether a model of sentence-transformers reads images, or another modality that is registered."""
    return not set(modalities()).isdisjoint(model.modalities)


def kind_of(given: Input) -> str:
    """ "text", "image", "text+image" or the same of another modality."""
    if isinstance(given, str):
        return "text"
    return f"text+{given.modality}" if given.text else given.modality


def as_model_input(given: Input, picture: Any = None, placeholders: Sequence[str] = ()) -> dict[str, Any]:
    """Build the input of a model that reads images: {"text"}, {"image"} (the modality) or both, image first.

    picture: that of the item, read. placeholders: what stands for an image in this model's text, and must
    not stand in the text itself.
    """
    text = given if isinstance(given, str) else given.text
    for token in placeholders:
        text = text.replace(token, "")
    shown = {} if isinstance(given, str) else {given.modality: picture}
    return {**shown, "text": text} if text or not shown else shown


def placeholders(model: Any) -> list[str]:
    """The tokens that stand for an image (or a video, a sound) in what the model reads."""
    names = ("image_token", "video_token", "audio_token")
    found = [getattr(processor, name, None) for processor in processors(model) for name in names]
    return [getattr(token, "content", token) for token in found if token]


def patch_token(model: Any) -> int | None:
    """The id of the token that a patch of an image has among those of texts; None if there is none."""
    for processor in processors(model):
        if (token := getattr(processor, "image_token", None)) and hasattr(processor, "tokenizer"):
            return int(processor.tokenizer.convert_tokens_to_ids(getattr(token, "content", token)))
    return None


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


def read_ahead(items: Iterable[Input], threads: int = READERS) -> Iterator[Any]:
    """The pictures (or sounds) of items, in order, read by threads that are a few ahead. Raises DataError."""
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                assert isinstance(item, Item)
                waiting.append(pool.submit(read, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def one_ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches, none of them None; the next is made by a thread while one is at work."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


def picture_batches(
    items: Sequence[Input], process: Callable[[list[Input], list[Any]], dict[str, Any]], budget: int
) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Positions of items, and what `process` makes of these and their pictures.

    As many in a batch as fit into `budget` numbers of pixels (of what a model reads of another modality),
    going by the last one; at most twice as many.
    """
    start, count, pictures = 0, 1, read_ahead(items)
    while start < len(items):
        rows = np.arange(start, min(start + count, len(items)))
        features = process(list(items[start : start + count]), [next(pictures) for _ in rows])
        yield rows, features
        start += len(rows)
        numbers = [v for v in features.values() if getattr(v, "is_floating_point", bool)()]
        each = sum(v.numel() for v in numbers) // len(rows)
        count = max(1, min(2 * count, budget // max(1, each)))


WHOLE = {"processing_kwargs": {"text": {"truncation": False, "max_length": None}}}
"""Options of `preprocess` so that it cuts nothing."""


def uncut(model: Any, given: list[dict[str, Any]], preprocess: Callable[..., dict]) -> dict[str, Any]:
    """The features of items with pictures, whose texts are cut so that nothing else is.

    Cutting what a template has made of an item, its end (often the token that is pooled) goes first, and
    without a word. Raises DataError for a picture that alone takes more tokens than the model reads.
    """
    features, limit = preprocess(given, **WHOLE), model.max_seq_length or 0
    mask = features.get("attention_mask") if "input_ids" in features else None  # else of sounds, not tokens
    if mask is None or not limit or mask.sum(1).max() <= limit:
        return features
    shorter = [_shortened(model, *each, limit) for each in zip(given, mask.sum(1).tolist(), strict=True)]
    return preprocess(shorter, **WHOLE)


def _shortened(model: Any, given: dict[str, Any], length: int, limit: int) -> dict[str, Any]:
    if length <= limit:
        return given
    tokens = model.tokenizer(given.get("text", ""), add_special_tokens=False)["input_ids"]
    if (kept := len(tokens) - (length - limit)) < 0:
        what = next(name for name in given if name != "text")
        if what == "image":
            what = f"an image of {' x '.join(map(str, given['image'].size))} pixels"
        raise DataError(f"{what} takes {length - len(tokens)} tokens, of at most {limit}")
    return {**given, "text": model.tokenizer.decode(tokens[:kept])}
