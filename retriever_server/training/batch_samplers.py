"""Batches of examples: without repeated texts, or shuffled; from one of several sets, by weight.

All are given to a trainer of sentence-transformers (`batch_sampler`, `multi_dataset_batch_sampler`). What
they yield depends on the seed, the epoch and the number of the batch alone (the trainer's own goes on with a
generator from epoch to epoch), so that the number of steps done is all that a checkpoint must keep.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from sentence_transformers.base.sampler import DefaultBatchSampler, MultiDatasetDefaultBatchSampler

from data.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_TRIES, _PASSES = 3, 1 << 20
Texts = tuple[frozenset[int], frozenset[int]]
"""Two sets of an example: texts that must be in no other (its query, its positive), and all of its texts."""


class NoDuplicates(DefaultBatchSampler):
    """Batches of one set in which no query or positive of an example is a text of another.

    The batches of `processes` in a row are one: none holds a text twice among all of them. There are as few
    as the most frequent text and the size of a batch allow, or nearly; all are about as full. Which they are
    depends on the seed and the epoch alone. Where processes would get unequal parts, some come up twice.
    An example takes its place by the texts it names, which are hashed once: no epoch renders one.
    """

    comes_out_even = True

    def __init__(
        self, dataset: Any, batch_size: int, drop_last: bool, processes: int = 1, **options: Any
    ) -> None:
        super().__init__(dataset, batch_size, drop_last, **options)
        self.processes, self.room = processes, batch_size * processes
        self.texts = texts_of_rows(dataset)
        frequent = max(Counter(chain.from_iterable(own for own, _ in self.texts)).values())
        fewest = -(-len(self.texts) // self.room)
        self.first = self._deal(0, max(frequent, fewest))
        if len(self.first) > 1.1 * fewest:
            mean = sum(map(len, self.first)) / len(self)
            logger.warning(
                "an epoch of all %d examples is %d batches of %.1f, not of %d: no batch holds a text twice, "
                "and one text is in %d examples", len(self.texts), len(self), mean, batch_size, frequent
            )  # fmt: skip

    def __len__(self) -> int:
        return len(self.first) * self.processes

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._plan():
            yield from (batch[i :: self.processes] for i in range(self.processes))

    def _plan(self) -> list[list[int]]:
        """The batches of this epoch, as many as of the first; of these alone where no others fit."""
        rng = np.random.default_rng([self.seed or 0, self.epoch])
        plan = self.first
        for attempt in range(_TRIES if self.epoch else 0):
            found = self._deal(self.epoch * _TRIES + attempt, len(self.first))
            if len(found) == len(self.first):
                plan = found
                break
        return [rng.permutation(plan[i]).tolist() for i in rng.permutation(len(plan))]

    def _deal(self, number: int, count: int) -> list[list[int]]:
        """All examples in `count` batches, or more where they do not fit; those of frequent texts first."""
        rng = np.random.default_rng([self.seed or 0, number, 1])
        units = -(-len(self.texts) // self.processes)
        sizes = [self.processes * (units // count + (i < units % count)) for i in range(count)]
        batches = [_Batch(min(size, self.room)) for size in sizes]
        at, left = 0, []
        for row in _frequent_first(self.texts, rng):
            tried = (i % count for i in range(at, at + count))
            found = next((i for i in tried if batches[i].takes(self.texts[row])), None)
            if found is None:
                left.append(row)
            else:
                batches[found].add(row, self.texts[row])
                at = found + 1
        for batch in batches:
            batch.size = self.room
        for row in left:
            batch = next((each for each in batches if each.takes(self.texts[row])), None)
            if batch is None:
                batches.append(batch := _Batch(self.room))
            batch.add(row, self.texts[row])
        return [self._evened(batch, rng) for batch in batches if batch.rows]

    def _evened(self, batch: _Batch, rng: Any) -> list[int]:
        """With examples of other batches, so that every process has as many."""
        batch.size = self.room
        for row in rng.permutation(len(self.texts)).tolist() if len(batch.rows) % self.processes else ():
            if batch.takes(self.texts[row]):
                batch.add(row, self.texts[row])
            if len(batch.rows) % self.processes == 0:
                return batch.rows
        if len(batch.rows) % self.processes:
            raise DataError(
                f"{self.processes} processes: a batch of {len(batch.rows)} examples, without a text twice, "
                "cannot be shared out; take fewer processes, or no_duplicates: false"
            )
        return batch.rows


class _Batch:
    def __init__(self, size: int) -> None:
        self.size, self.rows = size, []
        self.own, self.all = set(), set()

    def takes(self, texts: Texts) -> bool:
        """Return whether there is room, and no text would be its own negative."""
        own, every = texts
        return len(self.rows) < self.size and own.isdisjoint(self.all) and every.isdisjoint(self.own)

    def add(self, row: int, texts: Texts) -> None:
        self.rows.append(row)
        self.own |= texts[0]
        self.all |= texts[1]


def _frequent_first(texts: Sequence[Texts], rng: Any) -> list[int]:
    """All rows, those that share a text side by side, the most frequent texts first, else at random."""
    counts = Counter(chain.from_iterable(own for own, _ in texts))
    heaviest = [max(own, key=lambda text: (counts[text], text)) for own, _ in texts]
    place = {text: i for i, text in enumerate(dict.fromkeys(heaviest))}
    shuffled = rng.permutation(len(place))
    keys = [shuffled[place[text]] for text in heaviest]
    return np.lexsort((rng.random(len(texts)), keys, [-counts[text] for text in heaviest])).tolist()


def texts_of_rows(dataset: Any) -> list[Texts]:
    """The texts of each row of a data set of `as_dataset` or `passages_as_dataset`, as numbers."""
    transform = (dataset.format["format_kwargs"] or {}).get("transform")
    while isinstance(transform, partial):  # the trainer puts the name of the set around it
        transform = transform.keywords["transform"]
    key = getattr(transform, "key", lambda name, value: value)
    columns = {name: column for name, column in dataset.to_dict().items() if name != "label"}
    numbers: dict[Any, int] = {}

    def number(name: str, value: Any) -> list[int]:
        values = value if isinstance(value, list) else [value]
        return [numbers.setdefault(key(name, each), len(numbers)) for each in values]

    rows = []
    for row in zip(*columns.values(), strict=True):
        found = {name: number(name, value) for name, value in zip(columns, row, strict=True)}
        own = (ids for name, ids in found.items() if not name.startswith("negative_"))
        rows.append((frozenset(chain(*own)), frozenset(chain(*found.values()))))
    return rows


class Shuffled(DefaultBatchSampler):
    """Batches of one set, which may hold duplicates, in an order that only seed and epoch decide."""

    def __init__(self, dataset: Any, batch_size: int, drop_last: bool, **options: Any) -> None:
        super().__init__(dataset, batch_size, drop_last, **options)
        self.count = len(dataset)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count)
        yield from (order[i * self.batch_size :][: self.batch_size].tolist() for i in range(len(self)))


class Mixture(MultiDatasetDefaultBatchSampler):
    """Batches of several sets, each from one alone; the share of a set is its weight.

    A set that is used up starts again in another order. An epoch is as long as all sets' batches together.
    """

    def __init__(
        self,
        dataset: Any,
        batch_samplers: list[Any],
        generator: torch.Generator | None = None,
        seed: int = 0,
        weights: Sequence[float] | None = None,
        together: int = 1,
    ) -> None:
        """`weights`, one a set: by size if not given. `together`: how many batches in a row come from the
        same set: the number of processes, where negatives are gathered across them.

        Raises ConfigError for wrong weights, DataError for a set smaller than a batch that must be full.
        """
        super().__init__(dataset, batch_samplers, generator, seed)
        sizes = [len(sampler) for sampler in batch_samplers]
        if 0 in sizes:
            number = sizes.index(0) + 1
            raise DataError(f"set {number} of examples: has fewer than a batch of {self.batch_size}")
        weights = sizes if weights is None else weights
        if len(weights) != len(sizes) or min(weights) <= 0 or together < 1:
            given = f"weights = {list(weights)}, together = {together}"
            raise ConfigError(f"{given}: must be {len(sizes)} weights above 0, and together >= 1")
        self.shares, self.together, self.count = np.array(weights) / sum(weights), together, sum(sizes)

    @property
    def comes_out_even(self) -> bool:
        """Return whether all processes have as many examples in every batch."""
        return all(getattr(sampler, "comes_out_even", False) for sampler in self.batch_samplers)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        sets: Any = self.dataset.datasets
        starts = np.cumsum([0, *map(len, sets)]).tolist()
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.choice(len(self.shares), size=-(-self.count // self.together), p=self.shares)
        running = [self._run(number) for number in range(len(self.shares))]
        for number in order.repeat(self.together)[: self.count].tolist():
            yield [starts[number] + index for index in next(running[number])]

    def _run(self, number: int) -> Iterator[list[int]]:
        """The batches of one set without end, in another order each time round."""
        sampler: Any = self.batch_samplers[number]
        for turn in range(_PASSES):
            epoch = self.epoch * _PASSES + turn
            for owner in (sampler, getattr(sampler, "sampler", None)):  # they come with one for all sets
                if owner is not None and hasattr(owner, "generator"):
                    owner.generator = torch.Generator().manual_seed(self.seed + epoch)
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            yield from sampler
