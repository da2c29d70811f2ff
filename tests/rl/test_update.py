"""The update against a plain loop: what may not change it, does not."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from agent.trajectory import Segment, SegmentKind, StopReason, Trajectory
from rl.config import AlgorithmConfig, RolloutConfig, TrainConfig
from rl.credit import overlong_penalty
from rl.critic import Critic
from rl.logprobs import Scorer
from rl.optimizer import Optimizer
from rl.rewards import Reward
from rl.rollouts import Group, averages
from rl.update import Updater
from tests.fakes import question, tiny_model

VOCABULARY = 64
CONFIG = TrainConfig(
    policy="p",
    questions="q",
    retriever="r",
    out="o",
    rollout=RolloutConfig(questions_per_step=2, group_size=3),
    algorithm=AlgorithmConfig(learning_rate=1e-2, max_grad_norm=1e9, advantage="dr_grpo"),
)
ADVANTAGES = [1.0, -0.5, -0.5, 0.0, 0.7, -0.7]  # as rewards, too: each group's mean is 0


def trajectory(seed, model=None):
    """Prompt, policy, observation, policy; all of lengths of their own."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (4,), generator=generator).tolist()
    ids = torch.randint(0, VOCABULARY, (sum(lengths),), generator=generator).split(lengths)
    kinds = [SegmentKind.PROMPT, SegmentKind.POLICY, SegmentKind.OBSERVATION, SegmentKind.POLICY]
    segments = [
        Segment(k, i.tolist(), "", [-1.0] * len(i) if k is SegmentKind.POLICY else None)
        for k, i in zip(kinds, ids, strict=True)
    ]
    return Trajectory(question(), segments, StopReason.ANSWERED, "Paris")


BATCH = [trajectory(seed) for seed in range(6)]


def groups(batch=BATCH, rewards=ADVANTAGES):
    """Groups of three; the reward comes with the last turn."""
    scored = [Reward([0.0, reward], {}) for reward in rewards]
    return [Group(i, batch[3 * i : 3 * i + 3], scored[3 * i : 3 * i + 3]) for i in range(2)]


def changed(**algorithm):
    return replace(CONFIG, algorithm=replace(CONFIG.algorithm, **algorithm))


def updater(config=CONFIG, model=None, reference=None, critic=None):
    model = model or tiny_model("qwen2", VOCABULARY)
    scorer = Scorer(model, config.rollout)
    near = reference and Scorer(reference, config.rollout)
    return Updater(
        scorer,
        Optimizer(model, config.algorithm, config.algorithm.learning_rate),
        config,
        reference=near,
        critic=critic,
        critic_optimizer=critic and Optimizer(critic, config.algorithm, 1e-2),
        token_limit=20,
    )


def gradients(config=CONFIG, batch=BATCH, reference=None, critic=None):
    """The gradients of the policy's updates and the metrics: AdamW is replaced by a recorder."""
    made = updater(config, reference=reference, critic=critic)
    model, seen = made.scorer.model, []

    def record():
        seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
        return 0.0

    made.optimizer.update = record
    return seen, averages([made.update(groups(batch), 2)])


def plain_gradient(config=CONFIG):
    """The same loss by a loop over trajectories and tokens, no padding, no batch."""
    model = tiny_model("qwen2", VOCABULARY)
    total = 0.0
    for t, advantage in zip(BATCH, ADVANTAGES, strict=True):
        logits = model(torch.tensor([t.token_ids])).logits[0].float()
        for position, (token, trained) in enumerate(zip(t.token_ids, t.loss_mask, strict=True)):
            if trained:
                total = total - advantage * torch.log_softmax(logits[position - 1], -1)[token]
    (total / sum(sum(t.loss_mask) for t in BATCH)).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=2e-5, rtol=1e-3, msg=name)


def test_the_gradient_is_that_of_a_plain_loop():
    (ours,), _ = gradients()
    assert_same(ours, plain_gradient())


@pytest.mark.parametrize("tokens", [1, 40, 10_000])
@pytest.mark.parametrize("packing", [True, False])
def test_neither_micro_batches_nor_their_layout_change_the_gradient(tokens, packing):
    (ours,), _ = gradients(replace(CONFIG, micro_batch_tokens=tokens, packing=packing))
    assert_same(ours, plain_gradient())


def test_a_reference_that_agrees_changes_no_gradient_and_has_no_kl():
    config = changed(kl_coefficient=0.5)
    (ours,), metrics = gradients(config, reference=tiny_model("qwen2", VOCABULARY))
    assert_same(ours, plain_gradient())
    assert metrics["policy/kl"] == pytest.approx(0, abs=1e-6)


def test_a_reference_that_differs_pulls():
    config = changed(kl_coefficient=0.5)
    (ours,), metrics = gradients(config, reference=tiny_model("qwen2", VOCABULARY, seed=1))
    assert metrics["policy/kl"] > 0
    with pytest.raises(AssertionError):
        assert_same(ours, plain_gradient())


def test_observations_in_the_loss_change_the_gradient():
    (ours,), _ = gradients(replace(CONFIG, mask_observations=False))
    with pytest.raises(AssertionError):
        assert_same(ours, plain_gradient())


def test_several_updates_use_the_ratio_to_the_sampling_policy():
    config = changed(updates_per_rollout=2, learning_rate=0.05)
    seen, _ = gradients(config)
    assert len(seen) == 2  # one a group
    metrics = averages([updater(config).update(groups(), 2)])
    assert metrics["policy/clip_fraction"] > 0  # the second update is off-policy


def test_bfloat16_weights_do_not_round_small_updates_away():
    def moved(dtype):
        model = tiny_model("qwen2", VOCABULARY).to(dtype)
        before = model.get_parameter("model.norm.weight").float().clone()  # all ones: bf16 steps of 2^-8
        optimizer = Optimizer(model, AlgorithmConfig(), 1e-4)
        for _ in range(100):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.update()
        return (before - model.get_parameter("model.norm.weight").float()).mean().item()

    assert moved(torch.float32) == pytest.approx(1e-2, rel=0.01)
    assert moved(torch.bfloat16) == pytest.approx(1e-2, rel=0.25)  # one by one they would all be lost


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_optimiser_state_survives_the_disk(tmp_path, dtype):
    def train(model, optimizer, steps):
        for _ in range(steps):
            Updater(Scorer(model, CONFIG.rollout), optimizer, CONFIG).update(groups(), 2)

    whole = tiny_model("qwen2", VOCABULARY).to(dtype)
    train(whole, Optimizer(whole, CONFIG.algorithm, 1e-2), 4)
    model = tiny_model("qwen2", VOCABULARY).to(dtype)
    first = Optimizer(model, CONFIG.algorithm, 1e-2)
    train(model, first, 2)
    save_file(first.state(), tmp_path / "state.safetensors")
    second = Optimizer(model, CONFIG.algorithm, 1e-2)
    second.load_state(load_file(tmp_path / "state.safetensors"))
    train(model, second, 2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = tiny_model("qwen2", VOCABULARY)
    before = {n: p.clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    assert (
        Optimizer(model, CONFIG.algorithm, 1e-2).update() != Optimizer(model, CONFIG.algorithm, 1e-2).update()
    )
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def spoiled(trajectory):
    """The same trajectory, with nonsense for what the engine might say of tokens it did not sample."""
    segments = [
        s if s.kind is SegmentKind.POLICY else replace(s, logprobs=[-7.0] * len(s.token_ids))
        for s in trajectory.segments
    ]
    return replace(trajectory, segments=segments)


def test_a_sampler_that_was_sure_is_corrected_where_the_trainer_is_not():
    """A log-prob of exactly 0 is one that was sampled, in the weights and in what the sentinel watches."""

    def said(value):
        return [
            replace(t, segments=[s if s.logprobs is None else replace(s, logprobs=[value] * len(s.logprobs))
                                 for s in t.segments])
            for t in BATCH
        ]  # fmt: skip

    config = changed(importance="token")
    (sure,), metrics = gradients(config, said(0.0))
    (almost,), expected = gradients(config, said(-1e-6))
    assert_same(sure, almost)
    assert metrics == pytest.approx(expected, rel=1e-4)
    assert metrics["policy/importance_weight"] < 0.5 and metrics["policy/sampler_difference"] > 1
    (given,), metrics = gradients(config, said(None))
    assert_same(given, plain_gradient())
    assert metrics["policy/importance_weight"] == 1 and "policy/sampler_difference" not in metrics


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
def test_log_ratios_beyond_the_bounds_leave_the_update_finite_and_are_told(monkeypatch, caplog, kl_in):
    config = changed(updates_per_rollout=2, kl_coefficient=0.1, kl_in=kl_in)
    measured = Updater._measured

    def far_off(self, batch, measure):
        return [each - 99 for each in measured(self, batch, measure)]

    monkeypatch.setattr(Updater, "_measured", far_off)
    seen, metrics = gradients(config, reference=tiny_model("qwen2", VOCABULARY, seed=1))
    assert all(gradient.isfinite().all() for update in seen for gradient in update.values())
    assert metrics["policy/clamped_fraction"] == 1 and math.isfinite(metrics["policy/loss"])
    assert metrics["policy/kl_clamped_fraction"] == (1 if kl_in == "loss" else 0)  # there both are far off
    assert "tokens have a log-ratio beyond its bound (policy/clamped_fraction)" in caplog.text


PRESET_LIKE = {
    "ppo": {"advantage": "gae", "gae_lambda": 0.9, "gamma": 0.97, "whiten": True},
    "kl in reward": {
        "kl_coefficient": 0.3,
        "kl_in": "reward",
        "kl_estimator": "k1",
        "advantage": "reinforce_pp",
    },
    "gspo, sequence masking": {"surrogate": "gspo", "averaging": "trajectory", "importance": "sequence"},
    "cispo, token weights, entropy": {
        "surrogate": "cispo",
        "importance": "token",
        "entropy_coefficient": 0.1,
    },
}


@pytest.mark.parametrize("name", PRESET_LIKE)
def test_what_is_said_of_observation_tokens_changes_nothing(name):
    """Of values, log-probs and reference log-probs only those at policy tokens count."""
    config = changed(**PRESET_LIKE[name], updates_per_rollout=2)
    reference = tiny_model("qwen2", VOCABULARY, seed=1) if config.algorithm.kl_coefficient else None

    def run(batch, noise):
        critic = (
            Critic.from_policy(tiny_model("qwen2", VOCABULARY, seed=2))
            if config.algorithm.needs_critic
            else None
        )
        if critic is not None:
            torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
        made = [m for m in (critic and critic.trunk, reference and reference.base_model) if m is not None]
        hooks = [m.register_forward_hook(disturb_observations(noise), with_kwargs=True) for m in made]
        seen, metrics = gradients(config, batch, reference, critic)
        for hook in hooks:
            hook.remove()
        return seen, metrics

    before, clean = run(BATCH, 0.0)
    after, disturbed = run([spoiled(t) for t in BATCH], 100.0)
    for one, two in zip(before, after, strict=True):
        assert_same(one, two)
    assert clean == pytest.approx(disturbed, rel=1e-4, abs=1e-6)


def disturb_observations(noise):
    """A hook that adds noise to the hidden states from which no policy token is predicted."""
    known = {tuple(t.token_ids): [*t.loss_mask[1:], 0] for t in BATCH}

    def hook(module, arguments, keywords, output):
        ids, start = keywords["input_ids"][0].tolist(), 0
        while noise and start < len(ids):
            here = next(k for k in known if tuple(ids[start : start + len(k)]) == k)
            silent = torch.tensor(known[here]) == 0
            output.last_hidden_state.data[0, start : start + len(here)][silent] += noise
            start += len(here)

    return hook


def test_the_last_tokens_of_an_overlong_trajectory_cost_its_reward():
    penalty = overlong_penalty(torch.tensor([80, 90, 100, 120]), 100, 0.2)
    torch.testing.assert_close(penalty, torch.tensor([0.0, -0.5, -1.0, -1.0]))
