"""A step of learning by loops over trajectories and tokens in float64, from the papers' formulas.

Of rl/ it reads the configuration and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from agent.trajectory import SegmentKind, StopReason, Trajectory
from rl.config import TrainConfig
from rl.rollouts import Group

Gradients = dict[str, Tensor]


@dataclass
class Rows:
    """The trajectories of a batch, one after another, and what is found out about each of their tokens."""

    groups: Sequence[Group]
    config: TrainConfig
    token_limit: int
    trajectories: list[Trajectory] = field(init=False)
    positions: list[list[int]] = field(init=False)
    """Positions of the trained tokens of each trajectory."""
    turns: list[list[int]] = field(init=False)
    """Turn of each of these tokens."""

    def __post_init__(self) -> None:
        self.trajectories = [t for group in self.groups for t in group.trajectories]
        self.positions, self.turns = [], []
        for trajectory in self.trajectories:
            positions, turns, at, turn = [], [], 0, -1
            for segment in trajectory.segments:
                policy = segment.kind is SegmentKind.POLICY
                turn += policy
                if policy or (segment.kind is SegmentKind.OBSERVATION and not self.config.mask_observations):
                    positions += range(at, at + len(segment.token_ids))
                    turns += [turn] * len(segment.token_ids)
                at += len(segment.token_ids)
            self.positions.append(positions)
            self.turns.append(turns)

    def score(self, model: Any, row: int) -> tuple[list[Tensor], list[Tensor]]:
        """Log-probs of the trained tokens of a trajectory, and the entropy at each."""
        ids, rollout = self.trajectories[row].token_ids, self.config.rollout
        logits = model(torch.tensor([ids])).logits[0] / rollout.temperature
        logprobs, entropy = [], []
        for position in self.positions[row]:
            row_logits, taken = logits[position - 1], ids[position]
            if rollout.renormalise_logprobs:
                kept = sorted({*_likeliest(row_logits, rollout), taken})
                row_logits, taken = row_logits[kept], kept.index(taken)
            distribution = row_logits.log_softmax(0)
            logprobs.append(distribution[taken])
            entropy.append(-(distribution.exp() * distribution).sum())
        return logprobs, entropy

    def values(self, critic: Any, row: int) -> list[Tensor]:
        """The critic's values of the states before the trained tokens of a trajectory."""
        hidden = critic.trunk(torch.tensor([self.trajectories[row].token_ids])).last_hidden_state[0]
        return [hidden[p - 1] @ critic.head.weight[0] + critic.head.bias[0] for p in self.positions[row]]

    def sampled(self, row: int) -> list[float | None]:
        """The sampler's log-probs of the trained tokens; None where the policy did not write."""
        trajectory = self.trajectories[row]
        known = [
            value
            for segment in trajectory.segments
            for value in (segment.logprobs or [None] * len(segment.token_ids))
        ]
        return [known[position] for position in self.positions[row]]

    def rewards(self, row: int) -> list[float]:
        """Each turn's on its last token, with the penalty of an overlong trajectory on the last of all."""
        turns = self.turns[row]
        of_turn = [r for group in self.groups for r in group.rewards][row].turns
        rewards = [
            of_turn[turn] if at + 1 == len(turns) or turns[at + 1] != turn else 0.0
            for at, turn in enumerate(turns)
        ]
        share = self.config.algorithm.overlong_buffer
        if rewards and share:
            into = len(rewards) - (1 - share) * self.token_limit
            rewards[-1] -= min(max(into / (share * self.token_limit), 0.0), 1.0)
        return rewards

    def of_part(self, part: int) -> list[int]:
        """The trajectories of one of the updates: whole groups, in order."""
        parts = self.config.algorithm.updates_per_rollout
        numbers = [group.number for group in self.groups for _ in group.trajectories]
        return [row for row, number in enumerate(numbers) if number * parts // len(self.groups) == part]


def _likeliest(logits: Tensor, rollout: Any) -> list[int]:
    order = sorted(range(len(logits)), key=lambda token: -logits[token].item())
    kept, mass = [], 0.0
    for token in order[: rollout.top_k or len(logits)]:
        if mass < rollout.top_p:
            kept.append(token)
        mass += logits.softmax(0)[token].item()
    return kept


def plain_advantages(rows: Rows, rewards: list[list[float]], values: list[list[float]]) -> list[list[float]]:
    """Return the advantage of each token of each trajectory, before whitening."""
    algorithm, size = rows.config.algorithm, rows.config.rollout.group_size
    gamma, kind, found = algorithm.gamma, algorithm.advantage, []
    for row, own in enumerate(rewards):
        group = [mate for mate in range(row // size * size, row // size * size + size) if rewards[mate]]
        after = range(len(own))
        if kind == "gae":
            following = [*values[row][1:], 0.0]
            deltas = [own[i] + gamma * following[i] - values[row][i] for i in after]
            decay = gamma * algorithm.gae_lambda
            found.append([sum(decay ** (j - i) * deltas[j] for j in after[i:]) for i in after])
        elif kind == "reinforce_pp":
            found.append([sum(gamma ** (j - i) * own[j] for j in after[i:]) for i in after])
        elif kind == "turn":
            sums = {mate: _by_turn(rewards[mate], rows.turns[mate]) for mate in group}
            left = [
                {
                    m: sum(gamma ** (k - t) * x for k, x in enumerate(s) if k >= t)
                    for m, s in sums.items()
                    if t < len(s)
                }
                for t in range(3)
            ]
            found.append([_against(left[turn], row, "grpo") for turn in rows.turns[row]])
        else:
            found.append([_against({mate: sum(rewards[mate]) for mate in group}, row, kind) for _ in own])
    return found


def _by_turn(rewards: list[float], turns: list[int]) -> list[float]:
    return [
        sum(r for r, t in zip(rewards, turns, strict=True) if t == turn) for turn in range(max(turns) + 1)
    ]


def _against(returns: dict[int, float], row: int, kind: str) -> float:
    """A trajectory's return against the group's."""
    count, mean = len(returns), sum(returns.values()) / len(returns)
    if max(returns.values()) - min(returns.values()) < 1e-9:
        return 0.0
    difference = returns[row] - mean
    if kind == "grpo":
        return difference / (math.sqrt(sum((r - mean) ** 2 for r in returns.values()) / (count - 1)) + 1e-4)
    return difference * count / (count - 1) if kind == "rloo" else difference


def plain_whitened(advantages: list[list[float]]) -> list[list[float]]:
    """With mean 0 and spread 1 over all tokens."""
    flat = [a for each in advantages for a in each]
    mean = sum(flat) / len(flat)
    spread = math.sqrt(sum((a - mean) ** 2 for a in flat) / (len(flat) - 1) + 1e-8)
    return [[(a - mean) / spread for a in each] for each in advantages]


class PlainLearner:
    """The same step, by loops. `update` says the gradients of the policy's and the critic's updates."""

    def __init__(
        self, model: Any, reference: Any, critic: Any, config: TrainConfig, token_limit: int, rate: float
    ) -> None:
        """Copies of the models; reference and critic are None where there is none. rate: of the descent."""
        self.model, self.reference, self.critic = (
            each and deepcopy(each).double() for each in (model, reference, critic)
        )
        self.config, self.token_limit, self.rate = config, token_limit, rate
        self.policy_gradients: list[Gradients] = []
        self.critic_gradients: list[Gradients] = []
        self._sums: dict[str, list[float]] = {}

    @property
    def metrics(self) -> dict[str, float]:
        """Means over tokens, or over updates."""
        return {name: sum(values) / len(values) for name, values in self._sums.items()}

    def update(self, groups: Sequence[Group], step: int) -> None:
        """Learn from whole groups, in as many updates as the configuration says."""
        algorithm = self.config.algorithm
        self.rows = rows = Rows(groups, self.config, self.token_limit)
        everywhere = range(len(rows.trajectories))
        with torch.no_grad():
            self.old = [_numbers(rows.score(self.model, row)[0]) for row in everywhere]
            self.far = (
                [_numbers(rows.score(self.reference, row)[0]) for row in everywhere]
                if self.reference
                else None
            )
            self.values = [
                _numbers(rows.values(self.critic, row)) if self.critic else [] for row in everywhere
            ]
        advantages = plain_advantages(rows, [self._rewards(row) for row in everywhere], self.values)
        if self.critic:
            self.returns = [
                [a + v for a, v in zip(*each, strict=True)]
                for each in zip(advantages, self.values, strict=True)
            ]
            self._note(
                "critic/explained_variance", [_explained([*chain(*self.values)], [*chain(*self.returns)])]
            )
        self.advantages = plain_whitened(advantages) if algorithm.whiten else advantages
        if not algorithm.learn_from_turn_limit:
            ended = [t.stop_reason is StopReason.TURN_LIMIT for t in rows.trajectories]
            self.advantages = [
                [a * (not e) for a in row] for row, e in zip(self.advantages, ended, strict=True)
            ]
        for part in range(algorithm.updates_per_rollout):
            chosen = rows.of_part(part)
            if self.critic is None or step >= algorithm.critic_only_steps:
                self._update_policy(chosen)
            if self.critic:
                self._update_critic(chosen)

    def _rewards(self, row: int) -> list[float]:
        """Return each token's reward, less the divergence from the reference where it is in the reward."""
        algorithm, rewards = self.config.algorithm, self.rows.rewards(row)
        if self.far is None or algorithm.kl_in == "loss":
            return rewards
        differences = [torch.tensor(o - f) for o, f in zip(self.old[row], self.far[row], strict=True)]
        kl = [float(self._kl(difference)) for difference in differences]
        return [r - algorithm.kl_coefficient * k for r, k in zip(rewards, kl, strict=True)]

    def _kl(self, difference: Tensor) -> Tensor:
        """Schulman's estimate of KL(p || q), of log p - log q; k3 is bounded."""
        kind = self.config.algorithm.kl_estimator
        bounded = difference.clamp(-20, 20)
        kl = {"k1": difference, "k2": difference.square() / 2, "k3": (-bounded).exp() - 1 + bounded}[kind]
        self._note("policy/kl", [float(kl.detach())])
        self._note("policy/kl_clamped_fraction", [float(kind == "k3" and bool(difference.abs() > 20))])
        return kl

    def _update_policy(self, chosen: list[int]) -> None:
        algorithm, kl_in_loss = (
            self.config.algorithm,
            self.far is not None and self.config.algorithm.kl_in == "loss",
        )
        if not (kl_in_loss or algorithm.entropy_coefficient or algorithm.llds_coefficient):
            fed = [row for row in chosen if any(self.advantages[row])]
        else:
            fed = chosen
        if not fed:
            return
        tokens = sum(len(self.rows.positions[row]) for row in chosen)
        constant = algorithm.averaging_tokens or self.token_limit
        total: Any = 0.0
        for row in fed:
            losses = self._token_losses(row, kl_in_loss)
            divisor = {
                "token": tokens,
                "trajectory": len(losses) * len(chosen),
                "constant": len(chosen) * constant,
            }
            total = total + sum(losses) / max(1, divisor[algorithm.averaging])
        self.policy_gradients.append(self._descend(self.model, total, "policy"))

    def _token_losses(self, row: int, kl_in_loss: bool) -> list[Any]:
        """The loss of each token of a trajectory."""
        algorithm, losses = self.config.algorithm, []
        now, entropy = self.rows.score(self.model, row)
        old = self.old[row] if algorithm.updates_per_rollout > 1 else _numbers(now)
        trust = self._trust(old, self.rows.sampled(row))
        mean: Any = sum(n - o for n, o in zip(now, old, strict=True)) / max(1, len(now))
        moved = [float(n) - o for n, o in zip(now, old, strict=True)]
        sampled = self.rows.sampled(row)
        drift = sum(float(s - n) for n, s in zip(_numbers(now), sampled, strict=True) if s is not None)
        unlikely = drift / max(1, len(now)) > algorithm.off_policy_threshold > 0
        for at, (new, advantage) in enumerate(zip(now, self.advantages[row], strict=True)):
            log_ratio, bound = (new - old[at]).clamp(min=-20), 20.0
            if algorithm.surrogate == "gspo":  # the trajectory's, with the token's own gradient
                log_ratio, bound = mean.detach() + new - new.detach(), 10.0
            self._note("policy/clamped_fraction", [float(log_ratio.detach() > bound)])
            ratio = log_ratio.clamp(max=bound).exp()
            loss = self._surrogate(ratio, new, advantage, old[at]) * trust[at]
            if algorithm.off_policy_threshold:
                left_out = unlikely and advantage < 0
                self._note("policy/off_policy_fraction", [float(left_out)])
                loss = loss * (not left_out)
            if algorithm.llds_coefficient:
                turn, turns = self.rows.turns[row][at], self.rows.turns[row]
                whole = algorithm.llds_gate == "response"
                fell = sum(m for m, t in zip(moved, turns, strict=True) if whole or t == turn) < 0
                lost = advantage >= 0 and fell and moved[at] < 0
                self._note("policy/llds_fraction", [float(lost)])
                loss = loss + algorithm.llds_coefficient * (old[at] - new if lost else 0.0)
            if kl_in_loss and self.far:
                kl = self._kl(new - self.far[row][at])
                loss = loss + algorithm.kl_coefficient * kl * (ratio if algorithm.kl_unbiased else 1)
            losses.append(loss - algorithm.entropy_coefficient * entropy[at])
        self._note("policy/entropy", _numbers(entropy))
        self._note("policy/importance_weight", trust)
        return losses

    def _surrogate(self, ratio: Tensor, logprob: Tensor, advantage: float, old: float) -> Tensor:
        algorithm, high = self.config.algorithm, 1 + self.config.algorithm.clip_high
        if algorithm.surrogate == "cispo":
            self._note("policy/clip_fraction", [float(ratio > high)])
            return -ratio.detach().clamp(max=high) * advantage * logprob
        if algorithm.surrogate == "dppo":
            change = math.exp(float(logprob)) - math.exp(old)
            cut = change > algorithm.clip_high if advantage > 0 else change < -algorithm.clip_low
            cut = cut and advantage != 0
            self._note("policy/clip_fraction", [float(cut)])
            return -ratio * advantage * (not cut)
        if algorithm.surrogate == "sapo":
            steep = algorithm.sapo_temperature if advantage > 0 else algorithm.sapo_temperature_negative
            self._note("policy/clip_fraction", [0.0])
            return -4 / steep * advantage / (1 + (-steep * (ratio - 1)).exp())
        if algorithm.surrogate == "reinforce":
            self._note("policy/clip_fraction", [0.0])
            return -ratio.detach() * advantage * logprob
        free, clipped = ratio * advantage, ratio.clamp(1 - algorithm.clip_low, high) * advantage
        loss = -torch.minimum(free, clipped)
        bounded = algorithm.dual_clip and advantage < 0 and bool(loss > -algorithm.dual_clip * advantage)
        if bounded:
            loss = torch.full_like(loss, -algorithm.dual_clip * advantage)
        self._note("policy/clip_fraction", [float(bounded or bool(clipped < free))])
        return loss

    def _trust(self, old: list[float], sampled: list[float | None]) -> list[float]:
        """Return the weight of each token's loss, for what the sampler thought of it."""
        algorithm = self.config.algorithm
        differences = [0.0 if s is None else o - s for o, s in zip(old, sampled, strict=True)]
        for d in (d for d, s in zip(differences, sampled, strict=True) if s is not None):
            self._note("policy/sampler_difference", [abs(d)])
            self._note("policy/sampler_k3", [math.exp(d) - 1 - d])
            self._note("policy/sampler_ratio_above_2", [float(math.exp(d) > 2)])
            self._note("policy/sampler_ratio_below_half", [float(math.exp(d) < 0.5)])
        cap = algorithm.importance_cap
        if algorithm.importance == "token":
            return [min(math.exp(d), cap) for d in differences]
        if algorithm.importance == "token_mask":
            return [math.exp(d) if 1 / cap <= math.exp(d) <= cap else 0.0 for d in differences]
        whole = math.exp(sum(differences))
        if algorithm.importance == "sequence_truncate":
            return [min(whole, cap)] * len(differences)
        kept = algorithm.importance == "none" or 1 / cap <= whole <= cap
        return [float(kept)] * len(differences)

    def _update_critic(self, chosen: list[int]) -> None:
        clip, tokens = self.config.algorithm.value_clip, sum(len(self.returns[row]) for row in chosen)
        total: Any = 0.0
        for row in chosen:
            for value, old, goal in zip(
                self.rows.values(self.critic, row), self.values[row], self.returns[row], strict=True
            ):
                error = (value - goal) ** 2
                if clip:
                    error = torch.maximum(error, (old + (value - old).clamp(-clip, clip) - goal) ** 2)
                total = total + error / 2 / tokens
        self.critic_gradients.append(self._descend(self.critic, total, "critic"))

    def _descend(self, module: nn.Module, loss: Tensor, name: str) -> Gradients:
        module.zero_grad()
        loss.backward()
        gradients = {
            n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for n, p in module.named_parameters()
            if p.requires_grad
        }
        with torch.no_grad():
            for n, parameter in module.named_parameters():
                if n in gradients:
                    parameter -= self.rate * gradients[n]
        self._note(f"{name}/loss", [float(loss.detach())])
        self._note(f"{name}/grad_norm", [math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))])
        return gradients

    def _note(self, name: str, values: list[float]) -> None:
        self._sums.setdefault(name, []).extend(values)


def _numbers(tensors: Sequence[Tensor]) -> list[float]:
    return [float(tensor.detach()) for tensor in tensors]


def _explained(values: list[float], returns: list[float]) -> float:
    """1 - Var(returns - values) / Var(returns)."""

    def variance(numbers: list[float]) -> float:
        mean = sum(numbers) / len(numbers)
        return sum((n - mean) ** 2 for n in numbers) / len(numbers)

    return 1 - variance([r - v for r, v in zip(returns, values, strict=True)]) / variance(returns)
