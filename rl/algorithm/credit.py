"""Credit assignment: rewards put on turns, less KL, turned into advantages of tokens.

Everything per token is ragged: the trained tokens of one trajectory after those of another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from agent.trajectory import SegmentKind, StopReason, Trajectory
from rl.algorithm.advantages import ADVANTAGES, RewardBatch
from rl.algorithm.answer_likelihood import answer_credit
from rl.algorithm.losses import KL_ESTIMATORS, kl_clamped

if TYPE_CHECKING:
    from rl.algorithm.rewards import Reward
    from rl.config import TrainConfig
    from rl.learner.workers import Totals, Workers


@dataclass(frozen=True)
class TrainingBatch:
    """This process's groups of a step, and what is known of their trained tokens."""

    trajectories: Sequence[Trajectory]
    """Trajectories of all groups, in order; a row is a place in this list."""
    rewards: Sequence[Reward]
    device: torch.device
    columns: dict[str, list[Tensor]] = field(default_factory=dict)
    """old, reference (log-probs), values, advantages, returns: a tensor (tokens,) a trajectory; answer: the
    reference's mean log-prob of the gold answer before each turn."""

    def joined(self, name: str, rows: Sequence[int] | None = None) -> Tensor:
        """A column over these rows, or all, one after another (N,)."""
        column = self.columns[name]
        chosen = column if rows is None else [column[row] for row in rows]
        return torch.cat([torch.empty(0, device=self.device), *chosen])


def assign_advantages(
    batch: TrainingBatch,
    config: TrainConfig,
    workers: Workers,
    token_limit: int,
    decode: Callable[[list[int]], str],
) -> Totals:
    """Add the batch's advantages, and with a critic the returns that it should have foreseen.

    token_limit: the most tokens that a policy may write in a trajectory. decode: of the policy's tokenizer.
    Returns metrics.
    """
    algorithm, totals = config.algorithm, {}
    turn_tokens = [_turn_tokens(t, config.mask_observations) for t in batch.trajectories]
    counts = torch.tensor([sum(tokens) for tokens in turn_tokens], dtype=torch.long)
    rewards = place_rewards([reward.turns for reward in batch.rewards], turn_tokens)
    if algorithm.overlong_buffer:
        written = counts[counts > 0]
        rewards[written.cumsum(0) - 1] += overlong_penalty(written, token_limit, algorithm.overlong_buffer)
    rewards = rewards.to(batch.device)
    if "reference" in batch.columns and algorithm.kl_in == "reward":
        both = batch.joined("old"), batch.joined("reference")
        kl = KL_ESTIMATORS[algorithm.kl_estimator](*both)
        totals["policy/kl"] = (float(kl.sum()), float(kl.numel()))
        beyond = kl_clamped(algorithm.kl_estimator, *both)
        totals["policy/kl_clamped_fraction"] = (float(beyond), float(kl.numel()))
        rewards = rewards - algorithm.kl_coefficient * kl
    values = batch.joined("values") if "values" in batch.columns else None
    turns = [turn for tokens in turn_tokens for turn, count in enumerate(tokens) for _ in range(count)]
    size = config.rollout.group_size
    earned = RewardBatch(rewards, counts, torch.tensor(turns, dtype=torch.long), size, values)
    if algorithm.advantage in ("search_credit", "answer_likelihood"):
        found = _credit(batch, earned, turn_tokens, config, decode)
        totals[f"policy/{algorithm.advantage}"] = (float(found.abs().sum()), float(found.numel()))
        earned = replace(earned, credit=found.to(batch.device))
    if algorithm.llds_coefficient:
        turn_of = torch.tensor(turns, dtype=torch.long, device=batch.device)
        batch.columns["turns"] = list(turn_of.split(counts.tolist()))
    advantages = ADVANTAGES[algorithm.advantage](earned, algorithm.gamma, algorithm.gae_lambda)
    if values is not None:
        returns, size = advantages + values, len(values)
        batch.columns["returns"] = list(returns.split(counts.tolist()))
        totals["critic/explained_variance"] = (explained_variance(values, returns) * size, float(size))
    if algorithm.whiten:
        advantages = whiten(advantages, workers.sum)
    batch.columns["advantages"] = list(advantages.split(counts.tolist()))
    if not algorithm.learn_from_turn_limit:
        for trajectory, each in zip(batch.trajectories, batch.columns["advantages"], strict=True):
            if trajectory.stop_reason is StopReason.TURN_LIMIT:
                each.zero_()
    return totals


def _credit(
    batch: TrainingBatch,
    earned: RewardBatch,
    turn_tokens: Sequence[Sequence[int]],
    config: TrainConfig,
    decode: Callable[[list[int]], str],
) -> Tensor:
    """The credit of each token (N,) that the advantage adds to the outcome's."""
    from rl.algorithm.search_credit import search_credit  # late: it reads what evaluation does

    given = batch.trajectories, turn_tokens, earned.group_size, config.algorithm
    if config.algorithm.advantage == "search_credit":
        return search_credit(*given, decode, config.seed)
    outcome = ADVANTAGES["grpo"](earned, 1.0, 1.0).split(earned.counts.tolist())
    first = [float(each[0]) if len(each) else 0.0 for each in outcome]
    return answer_credit(*given, [each.tolist() for each in batch.columns["answer"]], first, config.seed)


def place_rewards(turn_rewards: Sequence[Sequence[float]], turn_tokens: Sequence[Sequence[int]]) -> Tensor:
    """Rewards by token (N,): each turn's on the last policy token of the turn.

    Both have one entry a turn of each trajectory: its reward, and how many policy tokens it has. The
    reward of a turn without any goes to the token before it; where there is none, to the next turn's.
    [[.2, 1]], [[2, 3]] -> [0, .2, 0, 0, 1]
    """
    flat: list[float] = []
    for rewards, lengths in zip(turn_rewards, turn_tokens, strict=True):
        first, waiting = len(flat), 0.0
        for reward, length in zip(rewards, lengths, strict=True):
            flat += [0.0] * length
            waiting += reward
            if len(flat) > first:
                flat[-1] += waiting
                waiting = 0.0
    return torch.tensor(flat)


def whiten(advantages: Tensor, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> Tensor:
    """Advantages (N,) with mean 0 and standard deviation 1 over the tokens of all processes.

    total: adds up a small tensor over the processes; every process calls it once, whatever its N.
    """
    exact = advantages.double()
    count, first, second = total(torch.stack([(exact**power).sum() for power in range(3)]))
    mean = first / count.clamp(min=1)
    variance = (second - count * mean.square()).clamp(min=0) / (count - 1).clamp(min=1)
    return ((exact - mean) * (variance + 1e-8).rsqrt()).to(advantages.dtype)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is perfect, 0 a constant; both (N,).

    0 where the returns do not vary.
    """
    spread = returns.var(correction=0)
    return float(1 - (returns - values).var(correction=0) / spread) if spread > 0 else 0.0


def overlong_penalty(written: Tensor, limit: int, buffer: float) -> Tensor:
    """0 up to the last `buffer` (a share) of `limit` tokens, then falling to -1 (DAPO, eq. 13).

    written (B,) tokens -> (B,)   [80, 90, 100, 120] of limit 100, buffer .2 -> [0, -.5, -1, -1]
    """
    width = buffer * limit
    return -((written - (limit - width)) / width).clamp(0, 1)


def _turn_tokens(trajectory: Trajectory, mask_observations: bool) -> list[int]:
    """Count the trained tokens of each turn of the policy, with what it read if that is trained, too."""
    turns: list[int] = []
    for segment in trajectory.segments[1:]:
        if segment.kind is SegmentKind.POLICY:
            turns.append(len(segment.token_ids))
        elif not mask_observations and turns:
            turns[-1] += len(segment.token_ids)
    return turns
