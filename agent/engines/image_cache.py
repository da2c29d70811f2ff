"""The picture part of the `hf` engine: what its model is fed where a trajectory holds pictures.

A picture is fed once, with the observation it came in; from then on the cache holds it. Trajectories of one
group are shown the same pages, so the vectors of the last ones are kept until the weights change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from agent.trajectory import Picture
from agent.vision import Vision

REMEMBERED = 64
"""Pictures whose vectors are kept."""

Shown = tuple[int, int, Sequence[Picture]]
"""A row: the positions of its first new token and after its last, and all its pictures."""


class Pictures:
    """Inputs of a model that reads images."""

    def __init__(self, model: PreTrainedModel, vision: Vision) -> None:
        self._model, self._vision = model, vision
        self._vectors: dict[str, Tensor] = {}

    def forget(self) -> None:
        """Drop what the old weights saw."""
        self._vectors.clear()

    def inputs(self, input_ids: Tensor, shown: Sequence[Shown]) -> dict[str, Tensor]:
        """Return the inputs of the model in place of `input_ids` (R, T), padded on the left.

        Pictures before a row's first new token are in the cache.
        """
        width = input_ids.shape[1]
        placed = [
            replace(picture, start=(row + 1) * width + picture.start - end)
            for row, (first, end, pictures) in enumerate(shown)
            for picture in pictures
            if first <= picture.start < end
        ]
        trunk: Any = self._model.base_model
        embedded = self._vision.embed(trunk, input_ids, placed, self._vectors)
        for source in list(self._vectors)[:-REMEMBERED]:
            del self._vectors[source]
        return {"inputs_embeds": embedded}


def shared_with_pictures(shared: int, before: Sequence[Picture], now: Sequence[Picture]) -> int:
    """Count the first of `shared` equal tokens whose pictures are equal too; no picture is cut in two."""
    for old, new in zip_longest(before, now):
        if old == new and new.start + new.tokens <= shared:
            continue
        return min([shared, *(picture.start for picture in (old, new) if picture)])
    return shared
