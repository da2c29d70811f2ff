"""The policy's loss, token by token. Pure functions of log-probs; averaging is the caller's one line."""

from __future__ import annotations

import torch
from torch import Tensor


def ppo_clip(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Clipped surrogate, to be minimised (Schulman et al. 2017, eq. 7; bounds apart as in DAPO, eq. 10).

    All (N,), one entry a policy token -> (N,).   -min(r A, clip(r, 1 - low, 1 + high) A)
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def clip_fraction(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, low: float, high: float
) -> Tensor:
    """Share of tokens whose gradient the clip cuts off.   (N,), (N,), (N,) -> ()"""
    ratio = (logprobs - old_logprobs).exp()
    cut = ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))
    return cut.float().mean()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) a token, never negative (Schulman 2020, "k3").   (N,) -> (N,)

    exp(d) - 1 - d with d = ref - policy
    """
    difference = ref_logprobs - logprobs
    return difference.exp() - 1 - difference
