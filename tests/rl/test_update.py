"""The update against a plain loop: what may not change it, does not."""

from dataclasses import replace

import pytest
import torch

from agent.trajectory import Segment, SegmentKind, StopReason, Trajectory
from rl.batch import micro_batches
from rl.config import AlgorithmConfig, RolloutConfig, TrainConfig
from rl.logprobs import token_logprobs
from rl.optimizer import Optimizer
from rl.update import Updater
from tests.fakes import question, tiny_model

VOCABULARY = 64
CONFIG = TrainConfig(
    policy="p",
    questions="q",
    retriever="r",
    out="o",
    rollout=RolloutConfig(questions_per_step=2, group_size=3),
    algorithm=AlgorithmConfig(learning_rate=1e-2, max_grad_norm=1e9),
)
ADVANTAGES = torch.tensor([1.0, -0.5, -0.5, 0.0, 0.7, -0.7])


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


def gradients(config=CONFIG, batch=BATCH, model=None, reference=None):
    """The gradient of one update: AdamW is replaced by a recorder."""
    model = model or tiny_model("qwen2", VOCABULARY)
    optimizer = Optimizer(model, config.algorithm)
    seen = []

    def record():
        seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
        return 0.0

    optimizer.update = record
    metrics = Updater(model, optimizer, config, reference).update(batch, ADVANTAGES)
    return seen, metrics


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
def test_micro_batches_do_not_change_the_gradient(tokens):
    (ours,), _ = gradients(replace(CONFIG, micro_batch_tokens=tokens))
    assert_same(ours, plain_gradient())


def test_a_reference_that_agrees_changes_no_gradient_and_has_no_kl():
    config = replace(CONFIG, algorithm=replace(CONFIG.algorithm, kl_coefficient=0.5))
    (ours,), metrics = gradients(config, reference=tiny_model("qwen2", VOCABULARY))
    assert_same(ours, plain_gradient())
    assert metrics["policy/kl"] == pytest.approx(0, abs=1e-6)


def test_a_reference_that_differs_pulls():
    config = replace(CONFIG, algorithm=replace(CONFIG.algorithm, kl_coefficient=0.5))
    (ours,), metrics = gradients(config, reference=tiny_model("qwen2", VOCABULARY, seed=1))
    assert metrics["policy/kl"] > 0
    with pytest.raises(AssertionError):
        assert_same(ours, plain_gradient())


def test_observation_tokens_are_read_and_never_learnt():
    model = tiny_model("qwen2", VOCABULARY)
    (batch,) = micro_batches(BATCH, [0], 10_000)
    taken = token_logprobs(model, batch, 1.0)
    assert taken.logprobs.numel() == sum(BATCH[0].loss_mask)
    # The gradient at the head's output for a token that only observations hold: none of it is a target.
    (everything,) = micro_batches(BATCH, [0], 10_000, train_observations=True)
    prompt = len(BATCH[0].segments[0].token_ids)
    assert everything.loss_mask.sum() == len(BATCH[0].token_ids) - prompt > batch.loss_mask.sum()


def test_observations_in_the_loss_change_the_gradient():
    (ours,), _ = gradients(replace(CONFIG, mask_observations=False))
    with pytest.raises(AssertionError):
        assert_same(ours, plain_gradient())


def test_several_updates_use_the_ratio_to_the_sampling_policy():
    config = replace(CONFIG, algorithm=replace(CONFIG.algorithm, updates_per_rollout=2, learning_rate=0.05))
    seen, _ = gradients(config)
    assert len(seen) == 2  # one a group
    model = tiny_model("qwen2", VOCABULARY)
    metrics = Updater(model, Optimizer(model, config.algorithm), config).update(BATCH, ADVANTAGES)
    assert metrics["policy/clip_fraction"] > 0  # the second update is off-policy


def test_temperature_is_that_of_the_sampler():
    model = tiny_model("qwen2", VOCABULARY)
    (batch,) = micro_batches(BATCH, [0], 10_000)
    ids = BATCH[0].token_ids
    logits = model(torch.tensor([ids])).logits[0].float() / 0.7
    expected = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    mask = torch.tensor(BATCH[0].loss_mask[1:], dtype=torch.bool)
    torch.testing.assert_close(token_logprobs(model, batch, 0.7).logprobs, expected[mask])


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "gemma3"])
def test_log_probs_of_every_architecture_are_those_of_its_own_forward(kind):
    model = tiny_model(kind, VOCABULARY)
    for batch in micro_batches(BATCH, range(6), 60):
        logits = model(batch.token_ids, attention_mask=batch.attention_mask).logits.float()
        full = torch.log_softmax(logits[:, :-1], -1).gather(2, batch.token_ids[:, 1:, None])[..., 0]
        taken = token_logprobs(model, batch, 1.0)
        torch.testing.assert_close(taken.logprobs, full[batch.loss_mask[:, 1:]], atol=1e-5, rtol=1e-5)


def test_bfloat16_weights_do_not_round_small_updates_away():
    def moved(dtype):
        model = tiny_model("qwen2", VOCABULARY).to(dtype)
        before = model.get_parameter("model.norm.weight").float().clone()  # all ones: bf16 steps of 2^-8
        optimizer = Optimizer(model, AlgorithmConfig(learning_rate=1e-4))
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
            Updater(model, optimizer, CONFIG).update(BATCH, ADVANTAGES)

    whole = tiny_model("qwen2", VOCABULARY).to(dtype)
    train(whole, Optimizer(whole, CONFIG.algorithm), 4)
    model = tiny_model("qwen2", VOCABULARY).to(dtype)
    first = Optimizer(model, CONFIG.algorithm)
    train(model, first, 2)
    first.save(tmp_path)
    second = Optimizer(model, CONFIG.algorithm)
    second.load(tmp_path)
    train(model, second, 2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = tiny_model("qwen2", VOCABULARY)
    before = {n: p.clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    assert Optimizer(model, CONFIG.algorithm).update() != Optimizer(model, CONFIG.algorithm).update()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
