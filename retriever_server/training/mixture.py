"""Which examples make a batch: several sets by weight, a batch from one of them, the same after a resume.

Both samplers are given to a trainer of sentence-transformers: `batch_sampler`, `multi_dataset_batch_sampler`.
What they yield depends on the seed, the epoch and the number of the batch alone, so that the number of steps
done is all that a checkpoint must keep. (The trainer's own for one set with duplicates draws from a generator
that runs on from epoch to epoch: resumed in the second epoch, it would yield other batches.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers.base.sampler import DefaultBatchSampler, MultiDatasetDefaultBatchSampler

from data.errors import ConfigError, DataError

_PASSES = 1 << 20


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
        """Whether all processes have as many examples in every batch."""
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
