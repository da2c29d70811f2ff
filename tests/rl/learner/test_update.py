"""Padding, packing and observations change no update; what no float holds, does no harm."""

import math
from dataclasses import replace

import pytest
import torch

from agent.trajectory import SegmentKind
from data.settings import LoraConfig
from rl.algorithm.credit import overlong_penalty
from rl.algorithm.presets import AlgorithmConfig
from rl.config import TrainConfig
from rl.learner.learner import Learner
from tests.fakes import tiny_model
from tests.rl.learner.learning import (
    VOCABULARY,
    Learned,
    configure,
    largest_difference,
    learn,
    make_groups,
    make_learner,
)

GROUPS = make_groups(5)


def changed(**algorithm) -> TrainConfig:
    return configure(AlgorithmConfig(**{"max_grad_norm": 1e9, "advantage": "dr_grpo", **algorithm}))


def rewritten(change):
    """The groups, with each segment as `change` makes it."""
    return [
        replace(g, trajectories=[replace(t, segments=[*map(change, t.segments)]) for t in g.trajectories])
        for g in GROUPS
    ]


def said(value):
    """The groups, with this log-prob of every token that the policy wrote."""
    return rewritten(lambda s: replace(s, logprobs=[value] * len(s.logprobs)) if s.logprobs else s)


def assert_same(one: Learned, other: Learned):
    for ours, theirs in ((one.policy, other.policy), (one.critic, other.critic)):
        assert largest_difference(ours, [given.gradients for given in theirs]) < 1e-5


def test_a_reference_that_agrees_changes_no_gradient_and_has_no_kl():
    """Adapters that say nothing yet are their own reference."""

    def at_the_start(config):
        learner = make_learner(replace(config, lora=LoraConfig(rank=2)))
        for name, parameter in learner.model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
        return learn(learner, GROUPS)

    near = at_the_start(changed(kl_coefficient=0.5))
    assert_same(near, at_the_start(changed()))
    assert near.metrics["policy/kl"] == pytest.approx(0, abs=1e-6)


def test_a_sampler_that_was_sure_is_corrected_where_the_trainer_is_not():
    """A log-prob of exactly 0 is one that was sampled, in the weights and in what the sentinel watches."""
    config = changed(importance="token")
    sure, almost, given = (learn(make_learner(config), said(value)) for value in (0.0, -1e-6, None))
    assert_same(sure, almost)
    assert sure.metrics == pytest.approx(almost.metrics, rel=1e-4)
    assert sure.metrics["policy/importance_weight"] < 0.5 and sure.metrics["policy/sampler_difference"] > 1
    assert_same(given, learn(make_learner(changed()), GROUPS))
    assert given.metrics["policy/importance_weight"] == 1
    assert "policy/sampler_difference" not in given.metrics


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
def test_log_ratios_beyond_the_bounds_leave_the_update_finite_and_are_told(monkeypatch, caplog, kl_in):
    measured = Learner._measured

    def far_off(self, batch, measure):
        return [each - 99 for each in measured(self, batch, measure)]

    monkeypatch.setattr(Learner, "_measured", far_off)
    learned = learn(make_learner(changed(updates_per_rollout=2, kl_coefficient=0.1, kl_in=kl_in)), GROUPS)
    assert all(g.isfinite().all() for given in learned.policy for g in given.gradients.values())
    assert learned.metrics["policy/clamped_fraction"] == 1 and math.isfinite(learned.metrics["policy/loss"])
    beyond = learned.metrics["policy/kl_clamped_fraction"]
    assert beyond == (1 if kl_in == "loss" else 0)  # there both are far off
    assert "tokens have a log-ratio beyond its bound (policy/clamped_fraction)" in caplog.text


def disturb(noise):
    """A hook that adds noise to the hidden states from which no policy token is predicted."""
    trajectories = [t for group in GROUPS for t in group.trajectories]
    known = {tuple(t.token_ids): [*t.loss_mask[1:], 0] for t in trajectories}

    def hook(module, arguments, keywords, output):
        ids, start = keywords["input_ids"][0].tolist(), 0
        while start < len(ids):
            here = next(k for k in known if tuple(ids[start : start + len(k)]) == k)
            silent = torch.tensor(known[here]) == 0
            output.last_hidden_state.data[0, start : start + len(here)][silent] += noise
            start += len(here)

    return hook


@pytest.mark.parametrize(
    "algorithm",
    [
        {"advantage": "gae", "gae_lambda": 0.9, "gamma": 0.97, "whiten": True},
        {"advantage": "reinforce_pp", "kl_coefficient": 0.3, "kl_in": "reward", "kl_estimator": "k1"},
        {"surrogate": "gspo", "averaging": "trajectory", "importance": "sequence", "kl_coefficient": 0.3},
        {"surrogate": "cispo", "importance": "token", "entropy_coefficient": 0.1},
    ],
    ids=["ppo", "kl in reward", "gspo", "cispo"],
)
def test_what_is_said_of_observation_tokens_changes_nothing(algorithm):
    """Only hidden states, values, log-probs and reference log-probs at policy tokens count."""

    def run(groups, noise):
        near = tiny_model("qwen2", VOCABULARY, seed=1)
        learner = make_learner(changed(**algorithm, updates_per_rollout=2), reference=near)
        trunks = [near.base_model, learner.model.base_model, learner.critic and learner.critic.trunk]
        for trunk in filter(None, trunks):
            trunk.register_forward_hook(disturb(noise), with_kwargs=True)
        return learn(learner, groups)

    def spoil(segment):
        if segment.kind is SegmentKind.POLICY:
            return segment
        return replace(segment, logprobs=[-7.0] * len(segment.token_ids), weights_version=5)

    clean, spoiled = run(GROUPS, 0.0), run(rewritten(spoil), 100.0)
    assert_same(clean, spoiled)
    assert clean.metrics == pytest.approx(spoiled.metrics, rel=1e-4, abs=1e-6)


def test_the_last_tokens_of_an_overlong_trajectory_cost_its_reward():
    penalty = overlong_penalty(torch.tensor([80, 90, 100, 120]), 100, 0.2)
    torch.testing.assert_close(penalty, torch.tensor([0.0, -0.5, -1.0, -1.0]))
