"""Advantages and losses against their definitions."""

import pytest
import torch

from rl.advantages import group_advantages
from rl.losses import clip_fraction, k3, ppo_clip


def test_group_advantages_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0, 1.0, 1.0, 1.0])
    expected = torch.tensor([1.0, -1.0, -1.0, 1.0, 3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)])
    torch.testing.assert_close(group_advantages(rewards, 4), expected, atol=1e-4, rtol=0)


def test_group_advantages_without_spread_are_centred_rewards():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25])
    torch.testing.assert_close(group_advantages(rewards, 4, scale=False), expected)


def test_a_group_of_equal_rewards_has_no_advantage():
    assert not group_advantages(torch.tensor([0.3, 0.3, 0.3, 1.0, 1.0, 1.0]), 3).any()
    assert not group_advantages(torch.full((8,), 1.2), 8).any()  # whose mean in fp32 is not 1.2


def test_rewards_that_do_not_divide_into_groups_are_refused():
    with pytest.raises(ValueError, match="5 rewards do not divide into groups of 2"):
        group_advantages(torch.zeros(5), 2)


def test_ppo_clip_by_hand():
    ratio = torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5])
    advantage = torch.tensor([2.0, 1.0, -1.0, 1.0, -1.0])
    loss = ppo_clip(ratio.log(), torch.zeros(5), advantage, 0.2, 0.28)
    torch.testing.assert_close(loss, torch.tensor([-2.0, -1.28, 1.5, -0.5, 0.8]))
    assert clip_fraction(ratio.log(), torch.zeros(5), advantage, 0.2, 0.28) == pytest.approx(2 / 5)


def test_on_policy_the_gradient_is_the_policy_gradient():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([0.5, -3.0])
    ppo_clip(logprobs, logprobs.detach(), advantages, 0.2, 0.2).sum().backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, -advantages)


def test_k3_is_never_negative_and_zero_where_the_policies_agree():
    ours, theirs = torch.randn(100), torch.randn(100)
    assert (k3(ours, theirs) >= 0).all()
    assert not k3(ours, ours).any()


def test_k3_estimates_the_divergence():
    p, q = torch.softmax(torch.randn(6), 0), torch.softmax(torch.randn(6), 0)
    estimate = (p * k3(p.log(), q.log())).sum()
    torch.testing.assert_close(estimate, (p * (p.log() - q.log())).sum(), atol=1e-5, rtol=1e-5)
