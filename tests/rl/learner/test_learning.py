"""A step of learning against loops over trajectories and tokens: every field of an algorithm."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from data.settings import LoraConfig
from rl.algorithm.presets import PRESETS, RECIPE_FIELDS, AlgorithmConfig, preset_fields
from tests.rl.learner.learning import (
    configure,
    largest_difference,
    learn,
    make_groups,
    make_learner,
    plain_learner,
)
from tests.samples import quick

LAYOUTS = [(True, 48), (False, 80)]
"""Packing, and the tokens of a micro-batch."""


def algorithm(**changes: Any) -> AlgorithmConfig:
    return AlgorithmConfig(**{"max_grad_norm": 1e9, **changes})


def preset(name: str, **changes: Any) -> AlgorithmConfig:
    return algorithm(**{**preset_fields(name), **changes})


TWO: dict[str, Any] = {"updates_per_rollout": 2, "clip_low": 0.02, "clip_high": 0.03}
"""The second update is off-policy, and clipped."""
NEAR = {"kl_coefficient": 0.2}
PPO = {"advantage": "gae", "value_clip": 0.05, **TWO}

FIELDS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "advantage": ({}, ["dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "turn", "gae"]),
    "gamma": ({"advantage": "reinforce_pp"}, [0.8]),
    "gae_lambda": (PPO, [0.7]),
    "whiten": ({"advantage": "dr_grpo"}, [True]),
    "surrogate": (TWO, ["gspo", "cispo", "reinforce", "dppo", "sapo"]),
    "sapo_temperature": ({**TWO, "surrogate": "sapo"}, [9.0]),
    "sapo_temperature_negative": ({**TWO, "surrogate": "sapo"}, [9.0]),
    "clip_low": ({**TWO, "advantage": "dr_grpo"}, [0.5]),
    "clip_high": (TWO, [0.5]),
    "dual_clip": (TWO, [1.04]),
    "averaging": ({}, ["trajectory", "constant"]),
    "averaging_tokens": ({"averaging": "constant"}, [5]),
    "updates_per_rollout": ({}, [2, 3, 4]),
    "kl_coefficient": ({}, [0.2]),
    "kl_estimator": (NEAR, ["k1", "k2"]),
    "kl_in": ({**NEAR, "advantage": "reinforce_pp"}, ["reward"]),
    "kl_unbiased": ({**TWO, **NEAR}, [True]),
    "entropy_coefficient": ({}, [0.3]),
    "llds_coefficient": (TWO, [0.5]),
    "llds_gate": ({**TWO, "llds_coefficient": 9.0}, ["response"]),
    "off_policy_threshold": ({}, [0.05]),
    "value_clip": (PPO, [0.0]),
    "importance": ({}, ["token", "sequence", "token_mask", "sequence_truncate"]),
    "importance_cap": ({"importance": "token"}, [1.2]),
    "learn_from_turn_limit": ({}, [False]),
    "overlong_buffer": ({"advantage": "reinforce_pp", "gamma": 0.9}, [0.9]),
}
"""Settings in which a field matters, and other values of it than the default's."""
ELSEWHERE = {
    "dynamic_sampling_rounds",
    *RECIPE_FIELDS,
    "credit_potential",
    "credit_weight",
    "credit_permuted",
    "answer_value",
}
"""Tested elsewhere: questions asked (test_collecting.py), the optimiser (below), credit of searches
(test_search_credit.py)."""

CASES = {
    f"{field} {value}": algorithm(**{**base, field: value})
    for field, (base, values) in FIELDS.items()
    for value in values
}
CASES |= {name: preset(name) for name in PRESETS}
CASES |= {f"{name}, two updates": preset(name, updates_per_rollout=2) for name in PRESETS}
CASES |= {
    "k1 in the reward": algorithm(**NEAR, kl_in="reward", kl_estimator="k1"),
    "k2 in the reward": algorithm(**NEAR, kl_in="reward", kl_estimator="k2", advantage="turn", gamma=0.7),
    "ppo near a reference": preset("search_r1_ppo", kl_coefficient=0.2, gamma=0.97, gae_lambda=0.8),
    "all at once": algorithm(
        **{**TWO, **NEAR, "entropy_coefficient": 0.1, "dual_clip": 1.05, "importance": "token"},
        surrogate="gspo",
        averaging="trajectory",
        overlong_buffer=0.9,
    ),
    "whole trajectories left out": algorithm(importance="sequence", importance_cap=4.0, **NEAR, **TWO),
}  # fmt: skip

CONFIGS = {name: configure(chosen) for name, chosen in CASES.items()}
CONFIGS |= {
    "temperature": configure(rollout={"temperature": 0.7}),
    "top_p": configure(rollout={"top_p": 0.6, "renormalise_logprobs": True}),
    "top_k": configure(rollout={"top_k": 5, "temperature": 1.3, "renormalise_logprobs": True}),
    "observations trained, by turn": configure(algorithm(advantage="turn"), mask_observations=False),
    "observations trained": configure(algorithm(importance="token"), mask_observations=False),
    "adapters": configure(lora=LoraConfig(rank=4, alpha=8)),
    "adapters near their start": configure(algorithm(**NEAR, **TWO), lora=LoraConfig(rank=4, alpha=8)),
    "adapters, kl in reward": configure(algorithm(**NEAR, kl_in="reward"), lora=LoraConfig(rank=2)),
    "ppo with adapters": configure(algorithm(**PPO), lora=LoraConfig(rank=4, alpha=4)),
}  # fmt: skip


def assert_as_by_loops(config, groups, kind="qwen2", layouts=LAYOUTS, step=0):
    plain = plain_learner(make_learner(config, kind), kind)
    plain.update(groups, step)
    for packing, tokens in layouts:
        learner = make_learner(replace(config, packing=packing, micro_batch_tokens=tokens), kind)
        found = learn(learner, groups, step)
        assert largest_difference(found.policy, plain.policy_gradients) < 1e-4
        assert largest_difference(found.critic, plain.critic_gradients) < 5e-5
        assert found.metrics == pytest.approx(plain.metrics, rel=1e-4, abs=1e-6)


SLOW = {*PRESETS, *(f"{name}, two updates" for name in PRESETS)} - {"grpo", "search_r1_ppo, two updates"}
SLOW |= {f"{field} {value}" for field, (_, values) in FIELDS.items() for value in values[1:]}
SLOW -= {f"surrogate {value}" for value in FIELDS["surrogate"][1]}
SLOW |= {"k1 in the reward", "ppo near a reference", "gae_lambda 0.7", "adapters, kl in reward"}
"""Samples of what fields show each by itself, together; further values of a field."""


@pytest.mark.parametrize(
    ("number", "name"),
    [
        pytest.param(number, name, marks=[pytest.mark.slow] if name in SLOW else [], id=name)
        for number, name in enumerate(CONFIGS)
    ],
)
def test_gradients_and_metrics_are_those_of_loops(number, name):
    """Packed or not in turn."""
    assert_as_by_loops(CONFIGS[name], make_groups(5), layouts=LAYOUTS[number % 2 :][:1])


@pytest.mark.parametrize("name", quick(["all at once"], ["all at once", "search_r1_ppo, two updates"]))
def test_the_size_of_micro_batches_changes_nothing(name):
    layouts = [(packing, tokens) for packing in (True, False) for tokens in (1, 16384)]
    assert_as_by_loops(CONFIGS[name], make_groups(6), layouts=layouts)


@pytest.mark.parametrize("kind", quick(["gemma3"], ["qwen3", "llama", "gemma3"]))
def test_so_they_are_for_other_architectures(kind):
    assert_as_by_loops(configure(algorithm(**TWO, **NEAR)), make_groups(7), kind)


def distance(one, other):
    """Between what AdamW is given; None where it is not even called alike."""
    if [len(one.policy), len(one.critic)] != [len(other.policy), len(other.critic)]:
        return None
    return max(
        largest_difference(getattr(one, of), [given.gradients for given in getattr(other, of)])
        for of in ("policy", "critic")
    )


def test_every_field_is_among_them_or_tested_by_itself():
    assert {field.name for field in fields(AlgorithmConfig)} == FIELDS.keys() | ELSEWHERE


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_changes_what_is_learned(name):
    base, values = FIELDS[name]
    groups = make_groups(5)
    before = learn(make_learner(configure(algorithm(**base))), groups)
    for value in values:
        after = learn(make_learner(configure(algorithm(**{**base, name: value}))), groups)
        moved = distance(after, before)
        assert moved is None or moved > 0.01, value


def optimised(**changes):
    """A configuration of PPO, whose policy and critic have optimisers of their own."""
    return configure(
        algorithm(**{"advantage": "gae", "learning_rate": 0.3, "critic_learning_rate": 0.7, **changes})
    )


def settings_of(learned, name):
    return [given.settings[name] for each in learned for given in each]


def test_policy_and_critic_learn_at_their_own_rates_each_warmed_up_by_itself():
    learner = make_learner(optimised(warmup_steps=2, critic_warmup_steps=4, weight_decay=0.04))
    steps = [learn(learner, make_groups(seed)) for seed in range(5)]
    policy, critic = [step.policy for step in steps], [step.critic for step in steps]
    assert settings_of(policy, "lr") == pytest.approx([0.15, 0.3, 0.3, 0.3, 0.3])
    assert settings_of(critic, "lr") == pytest.approx([0.7 * share for share in (0.25, 0.5, 0.75, 1, 1)])
    for each in (policy, critic):
        assert settings_of(each, "weight_decay") == [0.04] * 5
        assert settings_of(each, "betas") == [(0.9, 0.95)] * 5


def test_the_policy_alone_learns_less_and_less_over_the_last_steps():
    learner = make_learner(replace(optimised(decay_steps=3), steps=5))
    steps = [learn(learner, make_groups(seed), seed) for seed in range(5)]
    assert settings_of([step.policy for step in steps], "lr") == pytest.approx(
        [0.3 * share for share in (1, 1, 0.75, 0.5, 0.25)]
    )
    assert settings_of([step.critic for step in steps], "lr") == [0.7] * 5


def test_without_a_warm_up_the_first_update_has_the_whole_rate():
    learned = learn(make_learner(optimised()), make_groups(5))
    assert settings_of([learned.policy], "lr") == [0.3] and settings_of([learned.critic], "lr") == [0.7]


def test_a_gradient_beyond_the_norm_is_scaled_down_to_it_and_one_within_is_not():
    def norm(given):
        return sum(float(g.square().sum()) for g in given.gradients.values()) ** 0.5

    free = learn(make_learner(optimised()), make_groups(5))
    (policy,), (critic,) = free.policy, free.critic
    assert free.metrics["policy/grad_norm"] == pytest.approx(norm(policy), rel=1e-4)
    between = (norm(policy) * norm(critic)) ** 0.5
    clipped = learn(make_learner(optimised(max_grad_norm=between)), make_groups(5))
    for before, after in ((policy, clipped.policy[0]), (critic, clipped.critic[0])):
        scale = min(1.0, between / norm(before))
        for name, gradient in before.gradients.items():
            torch.testing.assert_close(after.gradients[name], gradient * scale, rtol=1e-4, atol=1e-7)
    assert clipped.metrics == pytest.approx(free.metrics)  # of before the clip


@pytest.mark.parametrize("step", range(4))
def test_the_critic_learns_alone_in_its_first_steps(step):
    learned = learn(make_learner(optimised(critic_only_steps=2)), make_groups(5), step)
    assert (len(learned.policy), len(learned.critic)) == (int(step >= 2), 1)
