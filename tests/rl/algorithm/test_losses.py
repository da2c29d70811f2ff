"""Surrogates, KL estimates and averaging against loops over their definitions."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.algorithm.losses import (
    KL_ESTIMATORS,
    SURROGATES,
    PolicyTokens,
    clamped,
    clip_fraction,
    kl_clamped,
    token_weights,
)
from rl.algorithm.presets import AlgorithmConfig, Averaging

AVERAGINGS: list[Averaging] = ["token", "trajectory", "constant"]
CLIPPED = AlgorithmConfig(clip_low=0.2, clip_high=0.28, dual_clip=2.0)

counts_of = st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any)
seeds = st.integers(0, 9999)


def random_tokens(counts, seed):
    random = torch.Generator().manual_seed(seed)
    size = sum(counts)
    old = -3 * torch.rand(size, generator=random)
    logprobs = old + 0.5 * torch.randn(size, generator=random)
    advantages = torch.randn(size, generator=random)
    row = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return PolicyTokens(logprobs.requires_grad_(), old, advantages, row)


def loops(surrogate, algorithm, tokens):
    """(value, derivative by the token's own log-prob) of each token, from the papers' formulas."""
    new, old, advantages = (t.tolist() for t in (tokens.logprobs, tokens.old_logprobs, tokens.advantages))
    row = tokens.row.tolist()
    low, high = 1 - algorithm.clip_low, 1 + algorithm.clip_high
    found = []
    for i, advantage in enumerate(advantages):
        mates = [j for j in range(len(row)) if row[j] == row[i]] if surrogate == "gspo" else [i]
        ratio = math.exp(sum(new[j] - old[j] for j in mates) / len(mates))
        if surrogate == "cispo":
            weight = min(ratio, high)
            found.append((-weight * advantage * new[i], -weight * advantage))
        elif surrogate == "reinforce":
            found.append((-ratio * advantage * new[i], -ratio * advantage))
        elif surrogate == "dppo":
            change = math.exp(new[i]) - math.exp(old[i])
            bound = algorithm.clip_high if advantage > 0 else algorithm.clip_low
            further = change > bound if advantage > 0 else -change > bound
            found.append((0.0, 0.0) if further else (-ratio * advantage, -ratio * advantage))
        elif surrogate == "sapo":
            steep = algorithm.sapo_temperature if advantage > 0 else algorithm.sapo_temperature_negative
            gate = 1 / (1 + math.exp(-steep * (ratio - 1)))
            found.append((-4 / steep * gate * advantage, -4 * gate * (1 - gate) * ratio * advantage))
        else:
            inside = ratio * advantage
            clipped = min(max(ratio, low), high) * advantage
            value = max(-inside, -clipped)
            if advantage < 0 and algorithm.dual_clip:
                value = min(value, -algorithm.dual_clip * advantage)
            found.append((value, -inside if value == -inside else 0.0))
    return torch.tensor(found)


def chosen(surrogate, **changes):
    return replace(CLIPPED, surrogate=surrogate, **changes)


@pytest.mark.parametrize("surrogate", SURROGATES)
@given(counts=counts_of, seed=seeds)
def test_loss_and_gradient_are_those_of_loops(surrogate, counts, seed):
    tokens, algorithm = random_tokens(counts, seed), chosen(surrogate)
    loss = SURROGATES[surrogate](tokens, algorithm)
    (gradient,) = torch.autograd.grad(loss.sum(), tokens.logprobs)
    value, derivative = loops(surrogate, algorithm, tokens).unbind(1)
    torch.testing.assert_close(loss.detach(), value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, derivative, atol=1e-5, rtol=1e-5)


def test_gspo_is_the_clipped_ratio_of_whole_trajectories():
    """Its token form: where the advantage is the trajectory's, value and gradient of one ratio each."""
    counts = torch.tensor([3, 1, 4])
    tokens = random_tokens(counts.tolist(), 5)
    tokens = replace(tokens, advantages=torch.tensor([1.0, -2.0, 0.5]).repeat_interleave(counts))
    algorithm = chosen("gspo", dual_clip=0.0, clip_low=0.1, clip_high=0.1)
    weights = token_weights("trajectory", counts, 8, 3, 0)
    loss = (weights * SURROGATES["gspo"](tokens, algorithm)).sum()
    differences = (tokens.logprobs - tokens.old_logprobs).split(counts.tolist())
    ratios = torch.stack([difference.mean().exp() for difference in differences])
    advantages = torch.tensor([1.0, -2.0, 0.5])
    whole = -torch.minimum(ratios * advantages, ratios.clamp(0.9, 1.1) * advantages).mean()
    torch.testing.assert_close(loss, whole)
    gradients = [torch.autograd.grad(value, tokens.logprobs)[0] for value in (loss, whole)]
    assert gradients[1].any() and not gradients[1].all()  # one is clipped, one is not
    torch.testing.assert_close(*gradients)


def by_hand(ratio, advantage):
    return PolicyTokens(ratio.log(), torch.zeros_like(ratio), advantage, torch.arange(len(ratio)))


def test_clip_by_hand():
    ratio = torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5, 5.0, 5.0])
    advantage = torch.tensor([2.0, 1.0, -1.0, 1.0, -1.0, -1.0, 0.0])
    expected = torch.tensor([-2.0, -1.28, 1.5, -0.5, 0.8, 2.0, 0.0])
    tokens = by_hand(ratio, advantage)
    torch.testing.assert_close(SURROGATES["ppo"](tokens, chosen("ppo")), expected)
    assert clip_fraction(tokens, chosen("ppo")) == pytest.approx(3 / 7)
    assert clip_fraction(tokens, chosen("ppo", dual_clip=0.0)) == pytest.approx(2 / 7)
    assert clip_fraction(tokens, chosen("cispo")) == pytest.approx(4 / 7)
    assert clip_fraction(tokens, chosen("reinforce")) == 0


@pytest.mark.parametrize("surrogate", ["ppo", "gspo"])
@given(counts=counts_of, seed=seeds)
def test_clip_fraction_counts_tokens_without_gradient(surrogate, counts, seed):
    tokens, algorithm = random_tokens(counts, seed), chosen(surrogate)
    (gradient,) = torch.autograd.grad(SURROGATES[surrogate](tokens, algorithm).sum(), tokens.logprobs)
    assert clip_fraction(tokens, algorithm) == pytest.approx(float((gradient == 0).float().mean()))


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_on_policy_the_gradient_is_the_policy_gradient(surrogate):
    tokens = random_tokens([3, 0, 2], 1)
    tokens = replace(tokens, old_logprobs=tokens.logprobs.detach())
    SURROGATES[surrogate](tokens, chosen(surrogate)).sum().backward()
    torch.testing.assert_close(tokens.logprobs.grad, -tokens.advantages)


def extreme(differences, advantages):
    """Tokens of one trajectory each, with these log-ratios."""
    new = torch.tensor(differences).requires_grad_()
    row = torch.arange(len(differences))
    return PolicyTokens(new, torch.zeros(len(row)), torch.tensor(advantages), row)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("dual_clip", [0.0, 2.0])
def test_losses_and_gradients_are_finite_whatever_the_log_ratio(surrogate, advantage, dual_clip):
    tokens = extreme([99.0, -99.0, 1e9, -1e9, math.inf], [advantage] * 5)
    algorithm = chosen(surrogate, dual_clip=dual_clip)
    loss = SURROGATES[surrogate](tokens, algorithm)[:4]
    (gradient,) = torch.autograd.grad(loss.sum(), tokens.logprobs)
    assert loss.isfinite().all() and gradient.isfinite().all()
    assert clamped(tokens, algorithm) == (3 if surrogate == "gspo" else 5)


def test_the_bounds_are_those_of_verl():
    """clamp(log r, -20, 20) of a token, clamp(mean log r, max=10) of a trajectory; no gradient beyond."""
    tokens = extreme([99.0, 19.0, 9.0], [-1.0] * 3)
    for surrogate, bound in (("ppo", 20.0), ("gspo", 10.0)):
        algorithm = chosen(surrogate, dual_clip=0.0)
        loss = SURROGATES[surrogate](tokens, algorithm)
        expected = torch.tensor([99.0, 19.0, 9.0]).clamp(max=bound).exp()
        torch.testing.assert_close(loss, expected)
        (gradient,) = torch.autograd.grad(loss.sum(), tokens.logprobs)
        torch.testing.assert_close(gradient, torch.where(tokens.logprobs > bound, 0.0, expected))


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_kl_estimates_are_finite_whatever_the_log_ratio(estimator):
    new = torch.tensor([99.0, -99.0, 500.0, -500.0]).requires_grad_()
    value = KL_ESTIMATORS[estimator](new, torch.zeros(4))
    (gradient,) = torch.autograd.grad(value.sum(), new)
    assert value.isfinite().all() and gradient.isfinite().all()
    assert kl_clamped(estimator, new, torch.zeros(4)) == (4 if estimator == "k3" else 0)


def test_within_the_bounds_nothing_is_clamped():
    tokens = extreme([19.9, -19.9, 3.0], [-1.0] * 3)
    assert clamped(tokens, CLIPPED) == 0
    torch.testing.assert_close(tokens.ratio, tokens.logprobs.exp())
    torch.testing.assert_close(KL_ESTIMATORS["k3"](tokens.logprobs, tokens.old_logprobs),
                               (-tokens.logprobs).exp() - 1 + tokens.logprobs)  # fmt: skip


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_batch_without_tokens_has_no_loss(surrogate):
    nothing = random_tokens([0, 0], 0)
    assert SURROGATES[surrogate](nothing, chosen(surrogate)).shape == (0,)
    assert clip_fraction(nothing, chosen(surrogate)) == 0


@pytest.mark.parametrize("averaging", AVERAGINGS)
@pytest.mark.parametrize("surrogate", SURROGATES)
@given(counts=counts_of, seed=seeds, cut=st.integers(0, 5))
@settings(max_examples=settings.default.max_examples // 2)
def test_micro_batches_change_neither_loss_nor_gradient(surrogate, averaging, counts, seed, cut):
    tokens, algorithm = random_tokens(counts, seed), chosen(surrogate)
    totals = (sum(counts), len(counts), 7)

    def loss(first, last):
        start, end = sum(counts[:first]), sum(counts[:last])
        part = PolicyTokens(
            tokens.logprobs[start:end],
            tokens.old_logprobs[start:end],
            tokens.advantages[start:end],
            tokens.row[start:end] - first,
        )
        weights = token_weights(averaging, torch.tensor(counts[first:last], dtype=torch.long), *totals)
        return (weights * SURROGATES[surrogate](part, algorithm)).sum()

    whole, split = loss(0, len(counts)), loss(0, cut) + loss(min(cut, len(counts)), len(counts))
    torch.testing.assert_close(whole, split)
    gradients = [torch.autograd.grad(value, tokens.logprobs)[0] for value in (whole, split)]
    torch.testing.assert_close(*gradients)


@given(counts=counts_of, seed=seeds)
def test_weights_are_the_averages_they_are_named_for(counts, seed):
    trajectories = torch.rand(sum(counts), generator=torch.Generator().manual_seed(seed)).split(counts)
    values, lengths = torch.cat(trajectories), torch.tensor(counts)
    means = [float(values.mean()), 0.0, 0.0]
    for trajectory in trajectories:
        means[1] += float(trajectory.sum()) / max(1, len(trajectory)) / len(counts)
        means[2] += float(trajectory.sum()) / 7 / len(counts)
    for averaging, expected in zip(AVERAGINGS, means, strict=True):
        weights = token_weights(averaging, lengths, sum(counts), len(counts), 7)
        assert float((weights * values).sum()) == pytest.approx(expected, rel=1e-5)
    assert float(token_weights("token", lengths, sum(counts), len(counts), 7).sum()) == pytest.approx(1)


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_weights_of_trajectories_sum_to_one(counts):
    weights = token_weights("trajectory", torch.tensor(counts), sum(counts), len(counts), 0)
    assert float(weights.sum()) == pytest.approx(1, rel=1e-5)


def test_weights_of_an_empty_batch_are_finite():
    for averaging in AVERAGINGS:
        assert token_weights(averaging, torch.tensor([0]), 0, 0, 0).shape == (0,)


def distributions():
    random = torch.Generator().manual_seed(3)
    logits = torch.randn(6, generator=random, requires_grad=True)
    return logits, logits.log_softmax(0), torch.randn(6, generator=random).log_softmax(0)


def test_kl_estimators_by_hand():
    ours, theirs = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    expected = {"k1": [0.5, -1.0], "k2": [0.125, 0.5], "k3": [math.exp(-0.5) - 0.5, math.e - 2]}
    for name, estimator in KL_ESTIMATORS.items():
        torch.testing.assert_close(estimator(ours, theirs), torch.tensor(expected[name]))
        assert not estimator(ours, ours).any()


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_k1_and_k3_are_the_divergence_on_average(name):
    _, ours, theirs = distributions()
    estimate = (ours.exp() * KL_ESTIMATORS[name](ours, theirs)).sum()
    torch.testing.assert_close(estimate, (ours.exp() * (ours - theirs)).sum())


def test_k2_and_k3_are_never_negative():
    ours, theirs = torch.randn(100), torch.randn(100)
    assert (KL_ESTIMATORS["k2"](ours, theirs) >= 0).all() and (KL_ESTIMATORS["k3"](ours, theirs) >= 0).all()


def test_gradients_of_the_estimators_in_the_loss():
    """Over the policy's own samples: k1's is zero, k2's is the divergence's, k3's is neither."""
    logits, ours, theirs = distributions()
    exact = (ours.exp() * (ours - theirs)).sum()
    (divergence,) = torch.autograd.grad(exact, logits, retain_graph=True)
    gradient = {}
    for name, estimator in KL_ESTIMATORS.items():
        loss = (ours.exp().detach() * estimator(ours, theirs)).sum()
        (gradient[name],) = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(gradient["k1"], torch.zeros(6), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient["k2"], divergence)
    assert not torch.allclose(gradient["k3"], divergence, atol=1e-2)
