"""Images in training: read and decoded where batches are put together.

What a data set hands out are items that name their images; the samplers, which compare them, never open one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from sentence_transformers.base.modules import Transformer

from data.modalities import read
from data.records import Input, Item
from retriever_server.encoders.image_inputs import as_model_input, placeholders, uncut
from retriever_server.retriever import texts_of


class ImageCollator:
    """`preprocess` of a model for texts and items: the workers of the data loader run it, and open images.

    Raises DataError naming an image that cannot be read.
    """

    def __init__(self, model: Any, reads_files: bool = True) -> None:
        self._model, self._placeholders, self._reads_files = model, placeholders(model), reads_files

    def __call__(self, inputs: Sequence[Any], **options: Any) -> dict[str, Any]:
        """The features of a column of a batch."""
        preprocess = partial(self._model.preprocess, **options)
        if not self._reads_files:
            return preprocess(texts_of(inputs, "the model in training"))
        given = [self._opened(each) for each in inputs]
        shown = any(set(each) - {"text"} for each in given)
        return uncut(self._model, given, preprocess) if shown else preprocess(given)

    def _opened(self, each: Input) -> dict[str, Any]:
        picture = read(each) if isinstance(each, Item) else None
        return as_model_input(each, picture, self._placeholders)


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
