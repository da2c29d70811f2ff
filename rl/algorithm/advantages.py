"""Advantages of tokens, from rewards: pure functions of ragged tensors, and the table of their names.

Everything per token is flat (N,): the policy tokens of all trajectories, one trajectory after another.
Observation tokens are in none of it. A new advantage is a function here and a line of the table: the
configuration takes its names from there, so torch is not imported on loading.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RewardBatch:
    """The rewards of a batch of trajectories; those of one question are neighbours."""

    rewards: Tensor  # (N,) of each policy token
    counts: Tensor  # (B,) policy tokens of each trajectory; 0 is allowed
    turns: Tensor  # (N,) from 0: the turn of its trajectory that a token belongs to
    group_size: int
    """Trajectories a question; B is a multiple of it."""
    values: Tensor | None = None  # (N,) of the critic; gae alone needs them
    credit: Tensor | None = None  # (N,) of search_credit.py or answer_likelihood.py

    @property
    def row(self) -> Tensor:
        """The trajectory that each token belongs to (N,)."""
        return self.counts.new_tensor(range(len(self.counts))).repeat_interleave(self.counts)


def gae(batch: RewardBatch, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantage estimation over policy tokens (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    The step after a policy token is the next *policy* token, however long the observation between them;
    after the last, the value is 0. Advantage + value is the critic's target.
    """
    values = batch.values
    if values is None:
        raise ValueError("advantage gae needs the critic's values")
    following = values.roll(-1)
    following[(batch.counts.cumsum(0) - 1)[batch.counts > 0]] = 0
    deltas = batch.rewards + gamma * following - values
    return _returns_to_go(deltas, batch.counts, gamma * gae_lambda)


def reinforce_pp(batch: RewardBatch, gamma: float, gae_lambda: float) -> Tensor:
    """Return from each token on (REINFORCE++, Hu et al. 2025, arXiv 2501.03262). Whiten it after."""
    return _returns_to_go(batch.rewards, batch.counts, gamma)


def grpo(batch: RewardBatch, gamma: float, gae_lambda: float) -> Tensor:
    """A trajectory's return against its group's mean, over the group's spread, for all its tokens (Shao et
    al. 2024, arXiv 2402.03300, section 4.1.2).   [1, 0, 0, 1] -> [.866, -.866, -.866, .866]

    The spread is the sample standard deviation + 1e-4, as in TRL; a group of equal returns gives
    exactly 0. Trajectories without policy tokens are not in the mean.
    """
    return _by_trajectory(batch, _scale)


def centred(batch: RewardBatch, gamma: float, gae_lambda: float) -> Tensor:
    """A trajectory's return less its group's mean: Dr. GRPO (Liu et al. 2025, arXiv 2503.20783, section 3.2)
    and, whitened after, REINFORCE++-baseline (2501.03262).   [1, 0, 0, 1] -> [.5, -.5, -.5, .5]
    """
    return _by_trajectory(batch, lambda differences, count: differences)


def rloo(batch: RewardBatch, gamma: float, gae_lambda: float) -> Tensor:
    """A trajectory's return less the mean of the others' (Ahmadian et al. 2024, arXiv 2402.14740):
    G / (G - 1) times that from the whole group's.   [1, 0, 0, 1] -> [.667, -.667, -.667, .667]
    """
    return _by_trajectory(batch, lambda differences, count: differences * count / (count - 1).clamp(min=1))


def turn(batch: RewardBatch, gamma: float, gae_lambda: float) -> Tensor:
    """The return from a turn on against the group's at the same turn, over its spread; for all its tokens.

    A variant of MT-GRPO (Zeng et al. 2025, arXiv 2505.11821) for any number of turns: it normalises, as
    grpo does, the sum of the rewards of the turn and the later ones, discounted by gamma a turn, over
    those of the group that got as far. With a reward at the end only and gamma 1 it is grpo a turn.
    """
    row, turns = batch.row, batch.turns
    shape = (batch.counts.numel(), int(turns.max()) + 1 if turns.numel() else 1)
    rewards = batch.rewards.new_zeros(shape).index_put((row, turns), batch.rewards, accumulate=True)
    present = rewards.new_zeros(shape).bool()
    present[row, turns] = True
    for at in reversed(range(shape[1] - 1)):
        rewards[:, at] += gamma * rewards[:, at + 1]  # from now on the return (B, turns)
    return against_group(rewards, present, batch.group_size)[row, turns]


def with_credit(batch: RewardBatch, gamma: float, gae_lambda: float) -> Tensor:
    """grpo's advantage and credit beside it: on the tokens of queries what their searches earned (arXiv
    2610.10179), or on all tokens of a turn what it made of the answer's likelihood (2607.13988)."""
    if batch.credit is None:
        raise ValueError("advantages search_credit and answer_likelihood need the credit")
    return grpo(batch, gamma, gae_lambda) + batch.credit


ADVANTAGES: dict[str, Callable[[RewardBatch, float, float], Tensor]] = {
    "gae": gae,
    "grpo": grpo,
    "dr_grpo": centred,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": centred,
    "turn": turn,
    "search_credit": with_credit,
    "answer_likelihood": with_credit,
}
"""(batch, gamma, gae_lambda) -> (N,); each takes of the two numbers what it needs."""
WITH_CRITIC = {"gae"}
WITHOUT_GROUPS = {"gae", "reinforce_pp"}
"""Advantages that do not compare a trajectory with others of its question."""


def permute(found: Tensor, present: Tensor, group_size: int, draw: random.Random) -> None:
    """Hand what is present of a column around at random within each group.   (B, K), (B, K) bool"""
    for first in range(0, len(found), group_size):
        for at in range(found.shape[1]):
            rows = [row for row in range(first, first + group_size) if present[row, at]]
            found[rows, at] = found[draw.sample(rows, len(rows)), at]


def _returns_to_go(rewards: Tensor, counts: Tensor, discount: float) -> Tensor:
    """Each token's reward and, discounted a token, those after it in its trajectory.   (N,) -> (N,)"""
    flat: list[float] = []
    for trajectory in rewards.split(counts.tolist()):
        from_end = accumulate(reversed(trajectory.tolist()), lambda later, now: now + discount * later)
        flat += reversed(list(from_end))
    return rewards.new_tensor(flat)


def _by_trajectory(batch: RewardBatch, scale: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    returns = batch.rewards.new_zeros(batch.counts.numel())
    returns = returns.index_add(0, batch.row, batch.rewards)[:, None]
    present = batch.counts[:, None] > 0
    return against_group(returns, present, batch.group_size, scale)[batch.row, 0]


def _scale(differences: Tensor, count: Tensor) -> Tensor:
    """Over their sample standard deviation.   (questions, G, K), (questions, 1, K)"""
    variance = differences.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
    return differences / (variance.sqrt() + 1e-4)


def against_group(
    returns: Tensor, present: Tensor, group_size: int, scale: Callable[[Tensor, Tensor], Tensor] = _scale
) -> Tensor:
    """Differences from the mean over those of the group that are present, then `scale`d.

    (B, K), (B, K) bool -> (B, K), each column by itself; 0 where all agree, one alone included. Raises
    ValueError if B is not a multiple.
    """
    if returns.shape[0] % group_size:
        raise ValueError(f"{returns.shape[0]} trajectories do not divide into groups of {group_size}")
    groups = returns.view(-1, group_size, returns.shape[1])  # (questions, G, K)
    absent = ~present.view_as(groups)
    count = (~absent).sum(1, keepdim=True)
    mean = groups.masked_fill(absent, 0).sum(1, keepdim=True) / count.clamp(min=1)
    # Equal returns that no float holds exactly have a mean a little off: their difference is noise.
    highest = groups.masked_fill(absent, -math.inf).amax(1, keepdim=True)
    lowest = groups.masked_fill(absent, math.inf).amin(1, keepdim=True)
    differences = (groups - mean).masked_fill(absent | (highest == lowest), 0)
    return scale(differences, count).view_as(returns)
