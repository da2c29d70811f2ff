"""Mixtures: a batch comes from one set, shares follow the weights, a resumed run sees the same batches."""

from collections import Counter
from itertools import islice

import pytest
import torch
from datasets import Dataset
from sentence_transformers.base.sampler import DefaultBatchSampler, NoDuplicatesBatchSampler
from torch.utils.data import ConcatDataset, RandomSampler

from data.errors import ConfigError, DataError
from retriever_server.training.batch_samplers import Mixture, Shuffled

SIZES = (10, 25)
BATCH = 4


def plain(dataset, generator):
    return DefaultBatchSampler(RandomSampler(dataset, generator=generator), BATCH, False, generator=generator)


def unique(dataset, generator):
    return NoDuplicatesBatchSampler(dataset, BATCH, False, [], generator, 7)


def shuffled(dataset, generator):
    return Shuffled(dataset, BATCH, False, generator=generator, seed=7)


def mixture(of=plain, sizes=SIZES, **options):
    """As the trainer makes it: all samplers with one generator."""
    generator = torch.Generator().manual_seed(7)
    sets = [Dataset.from_dict({"text": [f"{n} {i}" for i in range(size)]}) for n, size in enumerate(sizes)]
    return Mixture(ConcatDataset(sets), [of(each, generator) for each in sets], generator, 7, **options)


def sources(batches):
    """Return the set of each batch; fails where a batch is of several."""
    found = [{int(index >= SIZES[0]) for index in batch} for batch in batches]
    assert all(len(each) == 1 for each in found)
    return [each.pop() for each in found]


@pytest.mark.parametrize("of", [plain, unique, shuffled])
def test_batches_are_homogeneous_and_every_example_comes_up(of):
    mixed = mixture(of, weights=[1, 1])
    batches = list(mixed)
    assert len(batches) == len(mixed) == 3 + 7
    drawn = zip(batches, sources(batches), strict=True)
    of_first = [index for batch, number in drawn if number == 0 for index in batch]
    assert set(of_first) == set(range(10)) and Counter(of_first).most_common(1)[0][1] <= 3


def test_shares_follow_the_weights():
    drawn = []
    for epoch in range(25):
        mixed = mixture(weights=[3, 1])
        mixed.set_epoch(epoch)
        drawn += sources(mixed)
    assert 0.65 < drawn.count(0) / len(drawn) < 0.85  # 250 draws: .75 +- 4 standard errors


def test_without_weights_sets_go_by_their_size():
    assert mixture().shares.tolist() == [0.3, 0.7]


@pytest.mark.parametrize("of", [plain, unique, shuffled])
def test_a_resumed_epoch_is_the_same_whatever_was_drawn_before(of):
    whole = mixture(of)
    epochs = []
    for epoch in range(3):
        whole.set_epoch(epoch)
        epochs.append(list(whole))
    assert epochs[0] != epochs[1] != epochs[2]
    resumed = mixture(of)
    resumed.set_epoch(2)
    assert list(islice(resumed, 4, None)) == epochs[2][4:]


def test_the_order_of_one_set_needs_no_history_either():
    data = Dataset.from_dict({"text": list("abcdefghij")})
    sampler = Shuffled(data, 4, True, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    again = Shuffled(data, 4, True, seed=1)
    again.set_epoch(1)
    assert list(again) == second != first
    unequal = list(Shuffled(data, 4, False))
    assert [len(batch) for batch in first] == [4, 4] and [len(batch) for batch in unequal] == [4, 4, 2]
    assert sorted(index for batch in unequal for index in batch) == list(range(10))


def test_processes_side_by_side_get_batches_of_the_same_set():
    of = sources(mixture(together=2, weights=[1, 1]))
    assert all(of[i] == of[i + 1] for i in range(0, len(of), 2)) and len(set(of)) == 2


def test_wrong_weights_and_sets_that_are_too_small_are_refused():
    for weights in ([1], [1, 0], [1, -2]):
        with pytest.raises(ConfigError, match="must be 2 weights above 0"):
            mixture(weights=weights)
    with pytest.raises(DataError, match="set 2 of examples: has fewer than a batch of 4"):
        mixture(lambda data, generator: Shuffled(data, BATCH, True), sizes=(8, 3))
