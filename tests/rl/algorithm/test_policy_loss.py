"""Weights for a sampler that differs from the trainer, and the measures of how much it does."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl.algorithm.losses import mismatch, sampler_weights

ROW = torch.tensor([0, 0, 1, 1, 2])
SAMPLER = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0])
OLD = SAMPLER + torch.tensor([2.0, 1.5, 3.0, 0.4, 0.4]).log()  # products 3, 1.2, .4


def test_token_weights_are_the_ratio_up_to_the_cap():
    weights = sampler_weights("token", 2.0, OLD, SAMPLER, ROW)
    torch.testing.assert_close(weights, torch.tensor([2.0, 1.5, 2.0, 0.4, 0.4]))


def test_trajectories_whose_ratio_is_beyond_the_cap_are_left_out():
    assert sampler_weights("sequence", 2.0, OLD, SAMPLER, ROW).tolist() == [0, 0, 1, 1, 0]
    assert sampler_weights("sequence", 3.5, OLD, SAMPLER, ROW).tolist() == [1, 1, 1, 1, 1]


def test_none_weighs_every_token_alike():
    assert sampler_weights("none", 2.0, OLD, SAMPLER, ROW).tolist() == [1] * 5


@pytest.mark.parametrize("kind", ["none", "token", "sequence"])
def test_what_was_not_sampled_has_weight_one(kind):
    assert sampler_weights(kind, 2.0, OLD, SAMPLER, ROW, torch.zeros(5, dtype=torch.bool)).tolist() == [1] * 5
    partly = torch.tensor([False, True, True, True, True])  # the first trajectory's ratio is then 1.5
    assert sampler_weights(kind, 2.0, OLD, SAMPLER, ROW, partly)[0] == 1


def test_a_sampled_log_prob_of_exactly_zero_counts_as_any_other():
    """At temperature .7 a quarter of the tokens have it: the sampler was sure, the trainer may not be."""
    old, sure = torch.tensor([-5.0]), torch.zeros(1)
    assert float(sampler_weights("token", 2.0, old, sure, ROW[:1])) == pytest.approx(math.exp(-5))
    assert float(sampler_weights("sequence", 2.0, old, sure, ROW[:1])) == 0
    found = mismatch(old, sure)
    assert found["difference"] == 5 and found["ratio_below_half"] == 1
    assert found["k3"] == pytest.approx(math.exp(-5) + 4)


def test_weights_have_no_gradient():
    old = OLD.clone().requires_grad_()
    for kind in ("none", "token", "sequence"):
        assert not sampler_weights(kind, 2.0, old, SAMPLER, ROW).requires_grad


@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=5), seed=st.integers(0, 9999))
def test_equal_to_loops_over_the_definition(counts, seed):
    random = torch.Generator().manual_seed(seed)
    size = sum(counts)
    sampler = (-3 * torch.rand(size, generator=random) + 0.5).clamp(max=0)  # some are exactly 0
    sampled = torch.rand(size, generator=random) > 0.2
    old = sampler + 0.5 * torch.randn(size, generator=random)
    row = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    token, sequence, differences = [], [], []
    start = 0
    for count in counts:
        product = 1.0
        for i in range(start, start + count):
            differences.append(float(old[i] - sampler[i]) if sampled[i] else 0.0)
            ratio = math.exp(differences[-1])
            token.append(min(ratio, 1.7))
            product *= ratio
        sequence += [1.0 if 1 / 1.7 <= product <= 1.7 else 0.0] * count
        start += count
    torch.testing.assert_close(sampler_weights("token", 1.7, old, sampler, row, sampled), torch.tensor(token))
    assert sampler_weights("sequence", 1.7, old, sampler, row, sampled).tolist() == sequence
    expected = {
        "difference": sum(map(abs, differences)),
        "k3": sum(math.exp(d) - 1 - d for d in differences),
        "ratio_above_2": sum(math.exp(d) > 2 for d in differences),
        "ratio_below_half": sum(math.exp(d) < 0.5 for d in differences),
    }
    assert mismatch(old, sampler, sampled) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_measures_are_finite_whatever_the_log_ratio():
    found = mismatch(torch.tensor([0.0, -500.0, 0.0]), torch.tensor([-500.0, 0.0, 0.0]))
    assert all(map(math.isfinite, found.values())) and found["difference"] == 1000
    weights = sampler_weights("token", 2.0, torch.zeros(1), torch.tensor([-500.0]), ROW[:1])
    assert weights.tolist() == [2.0]


def test_engines_that_agree_have_no_mismatch():
    assert set(mismatch(SAMPLER, SAMPLER).values()) == {0.0}


def test_sums_of_micro_batches_are_those_of_the_batch():
    parts = [mismatch(OLD[:2], SAMPLER[:2]), mismatch(OLD[2:], SAMPLER[2:])]
    whole = mismatch(OLD, SAMPLER)
    assert {name: parts[0][name] + parts[1][name] for name in whole} == pytest.approx(whole)
