"""Our losses and gradients are those of TRL's GRPOTrainer, computed by the trainer itself.

Its side is padded (B, T) with a completion mask and a tool mask, ours holds the policy tokens alone.
"""

import pytest
import torch
from datasets import Dataset
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import nanstd

from rl.algorithm.advantages import ADVANTAGES, RewardBatch
from rl.algorithm.losses import (
    KL_ESTIMATORS,
    SURROGATES,
    PolicyTokens,
    clip_fraction,
    off_policy_mask,
    token_weights,
)
from rl.algorithm.presets import AlgorithmConfig, preset_fields
from tests.fakes import byte_tokenizer, tiny_model

LENGTHS = torch.tensor([9, 5, 12, 7, 12, 3])
WIDTH = 12


@pytest.fixture(scope="module")
def trl(tmp_path_factory):
    """A GRPOTrainer whose forward pass is replaced by log-probs that a test hands to it."""
    config = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        per_device_train_batch_size=2,
        num_generations=2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        use_bias_correction_kl=False,  # of the paper's GRPO; true multiplies k3 by the ratio
    )
    return GRPOTrainer(
        model=tiny_model("qwen2", 258),  # in eval mode: the loss is not divided by accumulation steps
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "?"}] * 2),
        processing_class=byte_tokenizer(),
    )


@pytest.fixture
def tensors():
    """The input of both sides; what stands at padding and observations is noise like the rest."""
    random = torch.Generator().manual_seed(0)
    shape = (len(LENGTHS), WIDTH)
    completion_mask = (torch.arange(WIDTH) < LENGTHS[:, None]).long()
    tool_mask = (torch.rand(shape, generator=random) > 0.3).long()
    tool_mask[:, 0] = 1
    old = -3 * torch.rand(shape, generator=random)
    return {
        "logprobs": (old + torch.randn(shape, generator=random)).requires_grad_(),
        "old_per_token_logps": old,
        "ref_per_token_logps": old + 0.5 * torch.randn(shape, generator=random),
        "completion_mask": completion_mask,
        "tool_mask": tool_mask,
        "advantages": torch.tensor([1.2, -0.7, 0.4, -1.5, 0.0, 0.9]),
    }


def theirs(trainer, tensors, monkeypatch, settings, delta):
    mask = tensors["completion_mask"] * tensors["tool_mask"]
    for name, value in settings.items():
        monkeypatch.setattr(trainer, name, value)
    monkeypatch.setattr(trainer.args, "delta", delta)
    forward = (tensors["logprobs"], torch.zeros(mask.shape), None)
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: forward)
    prompt = torch.ones((len(mask), 1), dtype=torch.long)
    inputs = {
        **tensors,
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": torch.zeros_like(mask),
        "num_items_in_batch": mask.sum(),
    }
    return trainer.compute_loss(trainer.model, inputs)


def ours(tensors, algorithm):
    mask = (tensors["completion_mask"] * tensors["tool_mask"]).bool()
    counts = mask.sum(1)
    row = torch.arange(len(counts)).repeat_interleave(counts)
    logprobs = tensors["logprobs"][mask]
    tokens = PolicyTokens(logprobs, tensors["old_per_token_logps"][mask], tensors["advantages"][row], row)
    weights = token_weights(algorithm.averaging, counts, int(mask.sum()), len(counts), WIDTH)
    loss = SURROGATES[algorithm.surrogate](tokens, algorithm)
    kl = KL_ESTIMATORS[algorithm.kl_estimator](logprobs, tensors["ref_per_token_logps"][mask])
    kl = kl * tokens.ratio if algorithm.kl_unbiased else kl
    if algorithm.off_policy_threshold:
        sampler = tensors["old_per_token_logps"][mask]
        loss = loss * off_policy_mask(tokens, sampler, algorithm.off_policy_threshold)
    return (weights * (loss + algorithm.kl_coefficient * kl)).sum(), clip_fraction(tokens, algorithm)


CASES = {
    "grpo": ("grpo", {"loss_type": "grpo"}),
    "dr_grpo": ("dr_grpo", {"loss_type": "dr_grpo", "max_completion_length": WIDTH}),
    "dapo": ("dapo", {"loss_type": "dapo"}),
    "bnpo": ("dapo", {"loss_type": "bnpo"}),
    "gspo": ("gspo", {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    "cispo": ("cispo", {"loss_type": "cispo"}),
    "sapo": ("grpo", {"loss_type": "sapo"}),
    "off_policy_mask": ("grpo", {"loss_type": "grpo", "off_policy_mask_threshold": 0.1}),
    "unbiased_kl": ("grpo", {"loss_type": "grpo"}),
}
"""Name: our preset, TRL's settings; the bounds and the KL weight are added to both."""
OURS = {
    "sapo": {"surrogate": "sapo"},
    "off_policy_mask": {"off_policy_threshold": 0.1},
    "unbiased_kl": {"kl_unbiased": True},
}
"""Fields that a case adds to the fields of its preset."""


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(
    "case, dual_clip", [*((case, 0.0) for case in CASES), ("grpo", 1.5), ("dapo", 1.5), ("gspo", 1.5)]
)
def test_loss_and_gradient_are_those_of_trl(trl, tensors, monkeypatch, case, beta, dual_clip):
    preset, settings = CASES[case]
    fields = {**preset_fields(preset), **OURS.get(case, {}), "kl_coefficient": beta, "kl_in": "loss"}
    algorithm = AlgorithmConfig(**{**fields, "dual_clip": dual_clip})
    monkeypatch.setattr(trl.args, "use_bias_correction_kl", algorithm.kl_unbiased)
    absolute = preset == "cispo"  # where TRL's epsilon_high is the bound itself, not its distance from 1
    settings = {
        "importance_sampling_level": "token",
        "epsilon_low": algorithm.clip_low,
        "epsilon_high": algorithm.clip_high + absolute,
        "beta": beta,
        **settings,
    }
    losses = [
        theirs(trl, tensors, monkeypatch, settings, dual_clip or None),
        ours(tensors, algorithm)[0],
    ]
    gradients = [torch.autograd.grad(loss, tensors["logprobs"])[0] for loss in losses]
    assert gradients[0].any()
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-5)


def test_clip_fraction_is_that_of_trl(trl, tensors, monkeypatch):
    settings = {"loss_type": "dapo", "importance_sampling_level": "token", "beta": 0.0}
    algorithm = AlgorithmConfig(**preset_fields("dapo"))
    bounds = {"epsilon_low": algorithm.clip_low, "epsilon_high": algorithm.clip_high}
    theirs(trl, tensors, monkeypatch, {**settings, **bounds}, None)
    expected = trl._metrics["eval"]["clip_ratio/region_mean"][-1]
    assert 0 < expected == pytest.approx(float(ours(tensors, algorithm)[1]))


def test_what_stands_at_observations_and_padding_changes_neither_side(trl, tensors, monkeypatch):
    algorithm = AlgorithmConfig(**preset_fields("grpo"))
    settings = {"loss_type": "grpo", "importance_sampling_level": "token", "beta": 0.001}

    def both():
        return torch.stack([theirs(trl, tensors, monkeypatch, settings, None), ours(tensors, algorithm)[0]])

    before = both()
    outside = tensors["completion_mask"] * tensors["tool_mask"] == 0
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        tensors[name][outside] -= 1.0
    assert torch.equal(both(), before)


def test_group_advantages_are_those_of_trl():
    rewards = torch.rand(12, generator=torch.Generator().manual_seed(1))
    groups = rewards.view(-1, 4)
    expected = (groups - groups.mean(1, keepdim=True)) / (nanstd(groups, dim=1, keepdim=True) + 1e-4)
    ones = torch.ones(12, dtype=torch.long)
    result = ADVANTAGES["grpo"](RewardBatch(rewards, ones, ones - 1, 4), 1.0, 1.0)
    torch.testing.assert_close(result, expected.flatten(), atol=1e-5, rtol=1e-5)
