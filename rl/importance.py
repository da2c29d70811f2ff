"""Sampler against trainer: the same weights give other log-probs in another engine. Measure, and correct.

A sampler's log-prob of exactly 0 stands for a token that the policy did not sample (a demonstration):
nothing is known about it, so it counts as no difference.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor


def sampler_weights(
    kind: Literal["none", "token", "sequence"],
    cap: float,
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    row: Tensor,
) -> Tensor:
    """Weights of the tokens' losses that correct for the sampler; log-probs (N,), row (N,) long -> (N,).

    token: the ratio trainer / sampler of each token, at most `cap` (truncated importance sampling; Yao
    et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training").
    sequence: 0 for trajectories whose ratio, the product over their policy tokens (as TRL's
    `sequence_mask`, no geometric mean: long trajectories go first), is above `cap` or below 1 / cap; 1 for
    the others. That is the rejection of masked importance sampling (Liu et al. 2025, "When Speed Kills
    Stability") without its ratio as weight.
    """
    log_ratio = _log_ratio(old_logprobs, sampler_logprobs)
    if kind == "token":
        return log_ratio.exp().clamp(max=cap)
    if kind == "sequence":
        size = torch.bincount(row).numel()
        summed = log_ratio.new_zeros(size).index_add(0, row, log_ratio)
        return (summed.abs() <= math.log(cap)).to(log_ratio.dtype)[row]
    return torch.ones_like(log_ratio)


def mismatch(old_logprobs: Tensor, sampler_logprobs: Tensor) -> dict[str, float]:
    """Sums over the tokens (N,), to be divided by their number; trainer / sampler is the ratio r.

    difference: of |log r|; k3: of r - 1 - log r, which estimates KL(sampler || trainer); ratio_above_2,
    ratio_below_half: tokens of such a ratio.
    """
    log_ratio = _log_ratio(old_logprobs, sampler_logprobs)
    ratio = log_ratio.exp()
    sums = {
        "difference": log_ratio.abs().sum(),
        "k3": (ratio - 1 - log_ratio).sum(),
        "ratio_above_2": (ratio > 2).sum(),
        "ratio_below_half": (ratio < 0.5).sum(),
    }
    return {name: float(value) for name, value in sums.items()}


def _log_ratio(old_logprobs: Tensor, sampler_logprobs: Tensor) -> Tensor:
    """log(trainer / sampler), 0 where the policy did not sample; nothing here has a gradient."""
    difference = (old_logprobs - sampler_logprobs).detach()
    return difference.masked_fill(sampler_logprobs == 0, 0)
