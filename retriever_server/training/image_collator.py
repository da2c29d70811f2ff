"""Images in training: read and decoded where batches are put together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from sentence_transformers.base.modules import Transformer

from data.pages.modalities import read
from data.records import Input, Item
from retriever_server.encoders.image_inputs import as_model_input, uncut
from retriever_server.encoders.read_spec import placeholders


class ImageCollator:
    """`preprocess` of a model for items in training: the workers of the data loader run it, and open images.

    Raises DataError naming an image that cannot be read.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._placeholders = model, placeholders(model)

    def __call__(self, inputs: Sequence[Input], **options: Any) -> dict[str, Any]:
        """The features of a column of a batch."""
        pictures = [read(each) if isinstance(each, Item) else None for each in inputs]
        each = zip(inputs, pictures, strict=True)
        given = [as_model_input(item, picture, self._placeholders) for item, picture in each]
        preprocess = partial(self._model.preprocess, **options)
        shown = any(picture is not None for picture in pictures)
        return uncut(self._model, given, preprocess) if shown else preprocess(given)


def without_absent_images(model: Any) -> None:
    """Let a model of sentence-transformers take texts cut out of a batch that had images elsewhere.

    The pixels of an item without images are zeros there; some vision towers fail where nothing else is left.
    """
    for module in model.modules():
        if isinstance(module, Transformer):
            module.register_forward_pre_hook(_drop_absent_images)


def _drop_absent_images(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
    count = given[0].get("num_images_per_sample") if given else None
    if count is None or int(count.sum()):
        return None
    kept = {key: value for key, value in given[0].items() if not key.startswith("pixel_")}
    return (kept, *given[1:])
