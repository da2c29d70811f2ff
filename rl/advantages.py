"""Advantages: what a trajectory's reward says about its tokens. Pure functions, one table."""

from __future__ import annotations

from torch import Tensor


def group_advantages(rewards: Tensor, group_size: int, scale: bool = True) -> Tensor:
    """Reward against its group's mean, over its spread if `scale` (Shao et al. 2024, eq. 4; Dr. GRPO: False).

    rewards (B,), groups contiguous, B a multiple of group_size -> (B,). A group of equal rewards gives 0.
    The spread is the population standard deviation. Raises ValueError if B is not a multiple.
    [1, 0, 0, 1] in one group -> [1, -1, -1, 1]
    """
    if rewards.numel() % group_size:
        raise ValueError(f"{rewards.numel()} rewards do not divide into groups of {group_size}")
    groups = rewards.view(-1, group_size)  # (questions, G)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if scale:
        centred = centred / (groups.std(dim=1, correction=0, keepdim=True) + 1e-6)
    # Equal rewards that no float holds exactly have a mean a little off: their difference is noise.
    equal = groups.max(dim=1, keepdim=True).values == groups.min(dim=1, keepdim=True).values
    return centred.masked_fill(equal, 0).flatten()


ADVANTAGES = {"grpo": group_advantages}
