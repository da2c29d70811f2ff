"""Images on their way into an encoder: read ahead of it, and wrapped so that no text is taken for one.

sentence-transformers takes a text that looks like a path or URL of an image for that image, and fetches it:
whatever goes into a model that reads images is a mapping that says which is which.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from data.errors import DataError
from data.pages.modalities import read
from data.records import Input

READERS = max(1, min(4, os.cpu_count() or 1))
"""Threads that read and decode images: Pillow leaves the interpreter to others meanwhile."""


def input_kind(given: Input) -> str:
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
    start, count = 0, 1
    with ThreadPoolExecutor(READERS) as pool:
        while start < len(items):
            chosen = list(items[start : start + count])
            features = process(chosen, list(pool.map(read, chosen)))
            yield np.arange(start, start + len(chosen)), features
            start += len(chosen)
            numbers = [v for v in features.values() if getattr(v, "is_floating_point", bool)()]
            each = sum(v.numel() for v in numbers) // len(chosen)
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
