"""The critic: whose states it values, what does not reach it, and its loss by hand."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from transformers.modeling_layers import GradientCheckpointingLayer

from agent.trajectory import Segment, SegmentKind, StopReason, Trajectory
from data.errors import DataError
from data.settings import LoraConfig
from rl.algorithm.credit import explained_variance
from rl.algorithm.losses import value_loss
from rl.learner.batch import micro_batches
from rl.learner.critic import Critic
from rl.learner.lora import add_lora
from tests.fakes import question, tiny_model

VOCABULARY = 64
KINDS = [SegmentKind.PROMPT, SegmentKind.POLICY, SegmentKind.OBSERVATION, SegmentKind.POLICY]


def trajectory(seed):
    """Prompt, policy, observation, policy; all of lengths of their own."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (4,), generator=generator).tolist()
    ids = torch.randint(0, VOCABULARY, (sum(lengths),), generator=generator).split(lengths)
    segments = [
        Segment(k, i.tolist(), "", [-1.0] * len(i) if k is SegmentKind.POLICY else None)
        for k, i in zip(KINDS, ids, strict=True)
    ]
    return Trajectory(question(), segments, StopReason.ANSWERED, "Paris")


TRAJECTORIES = [trajectory(seed) for seed in range(5)]


def batches(max_tokens=10_000, packing=False):
    return list(micro_batches(TRAJECTORIES, range(5), max_tokens, packing))


def critic_of(kind="qwen2", dtype=torch.float32):
    """A critic whose head says something: it is zero at first."""
    critic = Critic.from_policy(tiny_model(kind, VOCABULARY).to(dtype))
    with torch.no_grad():
        critic.head.weight.copy_(torch.randn(1, 32, generator=torch.Generator().manual_seed(3)))
        critic.head.bias.fill_(0.25)
    return critic


def plain_values(critic):
    """Trajectory by trajectory, token by token: the value at the position before each policy token."""
    values = {}
    for row, t in enumerate(TRAJECTORIES):
        hidden = critic.trunk(torch.tensor([t.token_ids])).last_hidden_state[0].float()
        scores = hidden @ critic.head.weight[0].float() + critic.head.bias[0].float()
        values[row] = torch.stack([scores[i - 1] for i, trained in enumerate(t.loss_mask) if trained])
    return values


def values_of(critic, found):
    values = {}
    for batch in found:
        values.update(zip(batch.rows, critic(batch).split(batch.counts.tolist()), strict=True))
    return values


def gradient(critic):
    return {n: p.grad for n, p in critic.named_parameters()}


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "gemma3"])
@pytest.mark.parametrize("packing", [True, False])
def test_values_are_those_of_a_plain_loop_however_the_batch_is_cut(kind, packing):
    critic = critic_of(kind)
    expected = plain_values(critic)
    for tokens in (1, 60, 10_000):
        found = values_of(critic, batches(tokens, packing))
        assert found.keys() == expected.keys()
        for row, values in expected.items():
            torch.testing.assert_close(found[row], values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_gradients_are_those_of_a_plain_loop_however_the_batch_is_cut(packing):
    def of(values):
        critic.zero_grad()
        sum(((-1) ** row) * v.square().sum() for row, v in values(critic).items()).backward()
        return {n: g.clone() for n, g in gradient(critic).items()}

    critic = critic_of()
    expected = of(plain_values)
    for tokens in (1, 60, 10_000):
        found = of(lambda critic, tokens=tokens: values_of(critic, batches(tokens, packing)))
        for name, g in expected.items():
            rounding = 1e-6 * float(g.abs().max())  # small entries are sums of large ones, up to 3,000
            torch.testing.assert_close(found[name], g, atol=max(1e-4, rounding), rtol=1e-4, msg=name)


def test_hidden_states_that_predict_no_policy_token_reach_no_value_and_no_gradient():
    """Whatever the trunk says inside prompts and observations: only what precedes a policy token counts."""

    def run(noise):
        critic = critic_of()
        (batch,) = batches()
        unread = torch.ones_like(batch.loss_mask)
        unread[:, :-1] = ~batch.loss_mask[:, 1:]

        def disturb(module, arguments, output):
            output.last_hidden_state = output.last_hidden_state + noise * unread[..., None]
            return output

        critic.trunk.register_forward_hook(disturb)
        values = critic(batch)
        value_loss(values, torch.zeros_like(values), torch.ones_like(values), 0.2).mean().backward()
        assert unread.any()
        return values.detach(), gradient(critic)

    values, plain = run(0.0)
    other_values, disturbed = run(1e3)
    assert torch.equal(values, other_values)
    assert all(torch.equal(plain[name], disturbed[name]) for name in plain)


def test_a_new_critic_says_nothing_and_is_apart_from_the_policy():
    policy = tiny_model("qwen2", VOCABULARY)
    before = {n: p.clone() for n, p in policy.named_parameters()}
    critic = Critic.from_policy(policy)
    assert not critic.training and all(p.requires_grad for p in critic.parameters())
    (batch,) = batches()
    assert not critic(batch).any()
    optimizer = torch.optim.AdamW(critic.parameters(), 0.1)
    for _ in range(2):
        (critic(batch) - 1).square().mean().backward()
        optimizer.step()
    assert critic(batch).all()
    assert all(torch.equal(p, before[n]) for n, p in policy.named_parameters())


@pytest.mark.parametrize("rank", [0, 4])
def test_the_trunk_is_the_policys_with_its_adapters_merged(rank):
    policy = tiny_model("qwen2", VOCABULARY)
    add_lora(policy, LoraConfig(rank=rank))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    critic = Critic.from_policy(policy)
    assert not any("lora" in name for name, _ in critic.named_parameters())
    assert all(p.requires_grad for p in critic.parameters())
    ids = torch.tensor([TRAJECTORIES[0].token_ids])
    expected = policy.base_model(ids).last_hidden_state
    torch.testing.assert_close(critic.trunk(ids).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def test_values_are_in_float32_also_of_bfloat16_weights():
    critic = critic_of(dtype=torch.bfloat16)
    assert {p.dtype for p in critic.parameters()} == {torch.bfloat16}  # one dtype, or FSDP2 refuses it
    found, expected = values_of(critic, batches()), plain_values(critic)
    assert all(v.dtype is torch.float32 for v in found.values())
    for row, values in expected.items():
        torch.testing.assert_close(found[row], values, atol=0.5, rtol=0.05)
    values = torch.cat(list(found.values()))
    assert not torch.equal(values, values.bfloat16().float())


def test_gradient_checkpointing_changes_no_gradient_of_the_trunk():
    (batch,) = batches()

    def run(checkpointing):
        critic = critic_of()
        if checkpointing:
            critic.trunk.gradient_checkpointing_enable()
            for layer in critic.modules():
                layer.training = isinstance(layer, GradientCheckpointingLayer)
        critic(batch).square().sum().backward()
        return gradient(critic)

    plain, checkpointed = run(False), run(True)
    for name, g in plain.items():
        torch.testing.assert_close(checkpointed[name], g, msg=name)


@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_critic_comes_back_bit_for_bit(kind, dtype, tmp_path):
    critic = critic_of(kind, dtype)
    (batch,) = batches(packing=True)
    expected = critic(batch)
    critic.save(tmp_path)
    other = Critic.from_policy(tiny_model(kind, VOCABULARY, seed=5).to(dtype))
    other.load(tmp_path)
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in critic.state_dict().items())
    assert torch.equal(other(batch), expected)
    trunk = AutoModel.from_pretrained(tmp_path)
    assert trunk.dtype is dtype
    assert all(torch.equal(t, critic.trunk.state_dict()[n]) for n, t in trunk.state_dict().items())
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


def test_a_state_gathered_elsewhere_is_what_is_saved(tmp_path):
    critic, other = critic_of(), Critic.from_policy(tiny_model("qwen2", VOCABULARY, seed=5))
    other.save(tmp_path, critic.state_dict())
    other.load(tmp_path)
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in critic.state_dict().items())


def other_layers(folder):
    Critic.from_policy(tiny_model("qwen2", VOCABULARY, num_hidden_layers=3)).save(folder)


def other_size(folder):
    Critic.from_policy(tiny_model("qwen2", VOCABULARY, hidden_size=64)).save(folder)


def policy_folder(folder):
    tiny_model("qwen2", VOCABULARY).save_pretrained(folder)


def other_head(folder):
    critic_of().save(folder)
    save_file({"weight": torch.zeros(2, 32), "bias": torch.zeros(2)}, folder / "value_head.safetensors")


def weight_missing(folder):
    critic_of().save(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("norm.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def cut_short(folder):
    critic_of().save(folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def unknown_model(folder):
    critic_of().save(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "no such thing"}))


@pytest.mark.parametrize(
    "make",
    [other_layers, other_size, policy_folder, other_head, weight_missing, cut_short, unknown_model],
    ids=lambda make: make.__name__,
)
def test_a_folder_that_is_no_critic_of_this_shape_is_refused_in_one_line(make, tmp_path):
    make(tmp_path)
    critic = critic_of()
    before = {n: t.clone() for n, t in critic.state_dict().items()}
    with pytest.raises(DataError, match=f"^{tmp_path}: (another critic|no critic)") as refused:
        critic.load(tmp_path)
    assert "\n" not in str(refused.value)
    assert all(torch.equal(t, before[n]) for n, t in critic.state_dict().items())


def test_value_loss_by_hand():
    old = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    values = torch.tensor([0.1, 0.5, 0.5, -0.5, 1.0])
    returns = torch.tensor([1.0, 1.0, -1.0, 1.0, 0.0])
    # Within the clip; beyond it towards the return (the clipped .2 counts); away from it (the value
    # itself counts, twice); not moved.
    expected = 0.5 * torch.tensor([0.81, 0.64, 2.25, 2.25, 1.0])
    torch.testing.assert_close(value_loss(values, old, returns, 0.2), expected)
    plain = 0.5 * torch.tensor([0.81, 0.25, 2.25, 2.25, 1.0])
    torch.testing.assert_close(value_loss(values, old, returns, 0), plain)


def test_value_loss_is_that_of_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    values, old, returns = (torch.randn(200, generator=generator) for _ in range(3))
    for clip in (0.0, 0.2, 0.5, 10.0):
        for v, o, r, found in zip(
            *(t.tolist() for t in (values, old, returns)),
            value_loss(values, old, returns, clip).tolist(),
            strict=True,
        ):
            near = min(max(v, o - clip), o + clip) if clip else v
            assert found == pytest.approx(0.5 * max((v - r) ** 2, (near - r) ** 2), rel=1e-4, abs=1e-6)


def test_a_value_that_moved_beyond_the_clip_towards_its_return_has_no_gradient():
    values = torch.tensor([0.5, 0.5, 0.1], requires_grad=True)
    value_loss(values, torch.zeros(3), torch.tensor([1.0, -1.0, 1.0]), 0.2).sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.0, 1.5, -0.9]))


def test_explained_variance_by_hand():
    returns = torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(returns + 3, returns) == 1  # a constant error is no variance
    assert explained_variance(torch.zeros(4), returns) == 0
    assert explained_variance(1 - returns, returns) == -3
    assert explained_variance(torch.tensor([0.0, 0.5, 0.0, 0.5]), returns) == 0.75
    assert explained_variance(torch.tensor([0.3, 0.2, 0.1, 0.0]), torch.ones(4)) == 0
    assert not math.isnan(explained_variance(torch.ones(1), torch.zeros(1)))
