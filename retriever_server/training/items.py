"""Images in training: read and decoded where batches are put together, in batches of one kind of pair.

What a data set hands out are items that name their images; the samplers, which compare them, never open one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sentence_transformers.base.modules import Transformer

from data.errors import ConfigError
from data.examples import Examples
from data.modalities import read
from data.records import Input, Item, Passage
from retriever_server.encoders.image_inputs import as_model_input, kind_of, placeholders, reads_files, uncut
from retriever_server.retriever import texts_of


class Opening:
    """`preprocess` of a model for items: it runs in the workers of the data loader, and opens images there.

    Raises DataError naming an image that cannot be read.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._placeholders = model, placeholders(model)
        self._reads_files = reads_files(model)

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


@dataclass(frozen=True)
class Pairs:
    """The kind of pair of each example, for batches that hold one kind alone."""

    examples: Examples
    render: Callable[[Passage], Input]

    def kind(self, query: int, passage: int) -> str:
        """What is asked and what answers.   -> "text > image" """
        answer = self.render(self.examples.corpus[passage])
        return f"{kind_of(self.examples[query].asked)} > {kind_of(answer)}"

    def split(self, dataset: Any, shares: Mapping[str, float], weight: float) -> dict[str, tuple[Any, float]]:
        """The rows of each kind of pair, and the weight of their batches; together they weigh `weight`.

        dataset: of `as_dataset`, form tuple. shares: of kinds; by their number of rows if empty.
        Raises ConfigError where `shares` does not name just the kinds that there are.
        """
        plain = dataset.with_format(None)
        rows: dict[str, list[int]] = {}
        for row, (query, passage) in enumerate(zip(plain["anchor"], plain["positive"], strict=True)):
            rows.setdefault(self.kind(query, passage), []).append(row)
        if shares and set(shares) != set(rows):
            raise ConfigError(f"train.shares: names {', '.join(shares)}; the pairs are {', '.join(rows)}")
        of = shares or {kind: len(each) for kind, each in rows.items()}
        total = sum(of.values())
        return {kind: (dataset.select(each), weight * of[kind] / total) for kind, each in rows.items()}
