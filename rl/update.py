"""Rewarded groups in, one or more optimiser updates out, for the policy and, with PPO, its critic.

Everything per token is ragged: the trained tokens of one trajectory after those of another. What the
prompt and the observations hold is in none of these tensors. A loss is averaged over the *global*
batch, however it is cut into micro-batches and processes. Trajectories whose advantages are zero have
no gradient without a KL or entropy term: they are not fed through the model, but they stay in the
denominator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from agent.trajectory import Segment, SegmentKind, StopReason, Trajectory
from data.records import Question
from rl.advantages import ADVANTAGES, Episodes, place_rewards, whiten
from rl.batch import MicroBatch, micro_batches
from rl.importance import mismatch, sampler_weights
from rl.lora import without_adapters
from rl.losses import (
    KL_ESTIMATORS,
    SURROGATES,
    PolicyTokens,
    clip_fraction,
    explained_variance,
    token_weights,
    value_loss,
)
from rl.workers import Workers

if TYPE_CHECKING:
    from rl.config import TrainConfig
    from rl.critic import Critic
    from rl.logprobs import Scorer
    from rl.optimizer import Optimizer
    from rl.rollouts import Group, Totals

Columns = dict[str, list[Tensor]]
"""Named values of the trained tokens, a tensor (tokens,) a trajectory."""


@dataclass(frozen=True)
class Updater:
    """What an update needs besides the batch."""

    scorer: Scorer
    optimizer: Optimizer
    config: TrainConfig
    workers: Workers = field(default_factory=Workers)
    reference: Scorer | None = None
    """The policy to stay near; the scorer itself where adapters are all that is trained."""
    critic: Critic | None = None
    critic_optimizer: Optimizer | None = None
    token_limit: int = 0
    """The most tokens that a policy may write in a trajectory."""

    def update(self, groups: Sequence[Group], count: int, step: int = 0) -> Totals:
        """`updates_per_rollout` updates over this process's groups, of `count` in all processes."""
        trajectories = [t for group in groups for t in group.trajectories]
        columns = self._score(trajectories)
        totals: Totals = {}
        self._credit(groups, trajectories, columns, totals)
        updates = self.config.algorithm.updates_per_rollout
        for part in range(updates):
            rows = [
                row
                for row, group in enumerate(g for g in groups for _ in g.trajectories)
                if group.number * updates // max(1, count) == part
            ]
            if step >= self.config.algorithm.critic_only_steps or self.critic is None:
                self._update_policy(trajectories, rows, columns, totals)
            if self.critic is not None:
                self._update_critic(trajectories, rows, columns, totals)
        return totals

    def _score(self, trajectories: Sequence[Trajectory]) -> Columns:
        """What must be known of the batch before the first update changes the policy."""
        algorithm = self.config.algorithm
        columns: Columns = {}
        if algorithm.updates_per_rollout > 1 or (self.reference and algorithm.kl_in == "reward"):
            columns["old"] = self._measure(trajectories, self._logprobs)
        if self.reference is not None:
            reference = self.reference
            with without_adapters(reference.model) if self.config.lora.rank else nullcontext():
                columns["reference"] = self._measure(trajectories, lambda batch: reference(batch).logprobs)
        if self.critic is not None:
            columns["values"] = self._measure(trajectories, self.critic)
        return columns

    @torch.no_grad()
    def _measure(
        self, trajectories: Sequence[Trajectory], module: Callable[[MicroBatch], Tensor]
    ) -> list[Tensor]:
        """One tensor (tokens,) a trajectory, of what `module` says about its trained tokens."""
        found: dict[int, Tensor] = {}
        for batch in self._micro_batches(trajectories, range(len(trajectories))):
            parts = module(batch).split(batch.counts.tolist())
            found.update(zip(batch.rows, parts, strict=bool(batch.rows)))
        return [found[row] for row in range(len(trajectories))]

    def _credit(
        self, groups: Sequence[Group], trajectories: Sequence[Trajectory], columns: Columns, totals: Totals
    ) -> None:
        """Add the advantages, and with a critic the returns that it should have foreseen."""
        algorithm, device = self.config.algorithm, self.scorer.model.device
        turn_tokens = [self._turn_tokens(t) for t in trajectories]
        rewards = place_rewards([r.turns for g in groups for r in g.rewards], turn_tokens).to(device)
        counts = torch.tensor([sum(tokens) for tokens in turn_tokens], dtype=torch.long)
        ends = counts.cumsum(0)[counts > 0] - 1
        if algorithm.overlong_buffer:
            rewards[ends] += overlong_penalty(counts, self.token_limit, algorithm.overlong_buffer)[
                counts > 0
            ].to(device)
        if self.reference is not None and algorithm.kl_in == "reward":
            estimate = KL_ESTIMATORS[algorithm.kl_estimator]
            kl = estimate(_joined(columns["old"], device), _joined(columns["reference"], device))
            _add(totals, "policy/kl", float(kl.sum()), kl.numel())
            rewards = rewards - algorithm.kl_coefficient * kl
        values = _joined(columns["values"], device) if self.critic is not None else None
        turns = torch.tensor(
            [turn for tokens in turn_tokens for turn, n in enumerate(tokens) for _ in range(n)]
        )
        episodes = Episodes(rewards, counts, turns.long(), self.config.rollout.group_size, values)
        advantages = ADVANTAGES[algorithm.advantage](episodes, algorithm.gamma, algorithm.gae_lambda)
        if values is not None:
            returns = advantages + values
            columns["returns"] = list(returns.split(counts.tolist()))
            _add(
                totals,
                "critic/explained_variance",
                explained_variance(values, returns) * len(returns),
                len(returns),
            )
        if algorithm.whiten:
            advantages = whiten(advantages, self.workers.sum)
        columns["advantages"] = list(advantages.split(counts.tolist()))

    def _update_policy(
        self, trajectories: Sequence[Trajectory], rows: Sequence[int], columns: Columns, totals: Totals
    ) -> None:
        """One update of the policy on its share of the batch."""
        algorithm = self.config.algorithm
        tokens = sum(len(columns["advantages"][row]) for row in rows)
        everywhere = self.workers.sum(torch.tensor([tokens, len(rows)], dtype=torch.float64))
        always = algorithm.entropy_coefficient or ("reference" in columns and algorithm.kl_in == "loss")
        fed = [row for row in rows if always or columns["advantages"][row].any()]
        if not sum(self.workers.gather(len(fed))):
            return
        loss_of = self._policy_loss(
            columns, total_tokens=float(everywhere[0]), total_trajectories=float(everywhere[1])
        )
        loss = self._accumulate(trajectories, fed, lambda batch: loss_of(batch, totals), self._logprobs)
        norm = self._step(self.scorer, self.optimizer)
        _add(totals, "policy/loss", loss, 1 / self.workers.count)
        _add(totals, "policy/grad_norm", norm, 1)

    def _policy_loss(
        self, columns: Columns, total_tokens: float, total_trajectories: float
    ) -> Callable[[MicroBatch, Totals], Tensor]:
        """The loss of a micro-batch as its share of the global average; its metrics go into the totals."""
        algorithm, device = self.config.algorithm, self.scorer.model.device
        constant = algorithm.averaging_tokens or self.token_limit

        def loss_of(batch: MicroBatch, totals: Totals) -> Tensor:
            taken = self.scorer(batch, entropy_gradient=algorithm.entropy_coefficient > 0)

            def column(name: str) -> Tensor:
                return torch.cat([columns[name][row] for row in batch.rows]).to(device)

            row, count = batch.row.to(device), taken.logprobs.numel()
            old = column("old") if "old" in columns else taken.logprobs.detach()
            tokens = PolicyTokens(taken.logprobs, old, column("advantages"), row)
            sampler = batch.sampler_logprobs.to(device)
            trust = sampler_weights(algorithm.importance, algorithm.importance_cap, old, sampler, row)
            each = SURROGATES[algorithm.surrogate](tokens, algorithm) * trust
            for name, value in mismatch(old, sampler).items():
                _add(totals, f"policy/sampler_{name}", float(value), count)
            _add(totals, "policy/importance_weight", float(trust.sum()), count)
            _add(totals, "policy/clip_fraction", float(clip_fraction(tokens, algorithm)) * count, count)
            _add(totals, "policy/entropy", float(taken.entropy.detach().sum()), count)
            if "reference" in columns and algorithm.kl_in == "loss":
                kl = KL_ESTIMATORS[algorithm.kl_estimator](taken.logprobs, column("reference"))
                _add(totals, "policy/kl", float(kl.detach().sum()), count)
                each = each + algorithm.kl_coefficient * kl
            if algorithm.entropy_coefficient:
                each = each - algorithm.entropy_coefficient * taken.entropy
            weights = token_weights(
                algorithm.averaging, batch.counts, total_tokens, total_trajectories, constant
            )
            return (weights.to(device) * each).sum()

        return loss_of

    def _update_critic(
        self, trajectories: Sequence[Trajectory], rows: Sequence[int], columns: Columns, totals: Totals
    ) -> None:
        """One update of the critic: its values of policy tokens towards their returns."""
        assert self.critic is not None and self.critic_optimizer is not None
        critic, clip = self.critic, self.config.algorithm.value_clip
        tokens = torch.tensor(float(sum(len(columns["returns"][row]) for row in rows)), dtype=torch.float64)
        everywhere = float(self.workers.sum(tokens))
        if not everywhere:
            return

        def loss_of(batch: MicroBatch) -> Tensor:
            values = critic(batch)
            old, returns = (
                torch.cat([columns[name][row] for row in batch.rows]) for name in ("values", "returns")
            )
            return value_loss(values, old, returns, clip).sum() / everywhere

        loss = self._accumulate(trajectories, rows, loss_of, critic)
        norm = self._step(critic, self.critic_optimizer)
        _add(totals, "critic/loss", loss, 1 / self.workers.count)
        _add(totals, "critic/grad_norm", norm, 1)

    def _accumulate(
        self,
        trajectories: Sequence[Trajectory],
        rows: Sequence[int],
        loss_of: Callable[[MicroBatch], Tensor],
        idle: Callable[[MicroBatch], Tensor],
    ) -> float:
        """Add up the gradients of these rows; returns their loss. `idle` takes part without any."""
        total = 0.0
        # FSDP averages gradients over the processes, where the loss is a share of the global average.
        scale = self.workers.count if self.sharded else 1
        for batch in self._micro_batches(trajectories, rows):
            loss = loss_of(batch) if batch.rows else idle(batch).sum() * 0
            if not loss.isfinite():  # its gradient may be: now no process takes this update
                loss = loss * torch.nan
            (loss * scale).backward()
            total += float(loss.detach())
        return total

    def _step(self, module: nn.Module, optimizer: Optimizer) -> float:
        if not self.sharded:
            self.workers.sum_gradients(p for p in module.parameters() if p.requires_grad)
        return optimizer.update()

    def _logprobs(self, batch: MicroBatch) -> Tensor:
        return self.scorer(batch).logprobs

    @property
    def sharded(self) -> bool:
        """Whether a forward pass of one process needs all the others."""
        return self.workers.count > 1 and self.config.sharding == "fsdp"

    def _micro_batches(self, trajectories: Sequence[Trajectory], rows: Sequence[int]) -> Iterator[MicroBatch]:
        """The rows in micro-batches; where weights are shared out, as many as any process has."""
        config = self.config
        observed = not config.mask_observations
        batches = list(micro_batches(trajectories, rows, config.micro_batch_tokens, config.packing, observed))
        if self.sharded:  # agreed on before the first of them, for every pass asks all processes
            idle = replace(next(micro_batches([_NOTHING], [0], 2)), rows=[])
            batches += [idle] * (max(self.workers.gather(len(batches))) - len(batches))
        yield from batches

    def _turn_tokens(self, trajectory: Trajectory) -> list[int]:
        """How many trained tokens each turn of the policy has, with what it read if that is trained, too."""
        turns: list[int] = []
        for segment in trajectory.segments[1:]:
            if segment.kind is SegmentKind.POLICY:
                turns.append(len(segment.token_ids))
            elif not self.config.mask_observations and turns:
                turns[-1] += len(segment.token_ids)
        return turns


_NOTHING = Trajectory(
    Question("nothing", "", ()),
    [Segment(SegmentKind.PROMPT, [0], ""), Segment(SegmentKind.POLICY, [0], "", [0.0])],
    StopReason.ANSWERED,
)
"""Fed where a process has less to do than another, for its part in sharing out the weights."""


def overlong_penalty(written: Tensor, limit: int, buffer: float) -> Tensor:
    """0 up to the last `buffer` (a share) of `limit` tokens, then falling to -1 (DAPO, eq. 13).

    written (B,) tokens -> (B,)   [80, 90, 100, 120] of limit 100, buffer .2 -> [0, -.5, -1, -1]
    """
    width = buffer * limit
    return -((written - (limit - width)) / width).clamp(0, 1)


def _joined(column: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat([*column, torch.empty(0, device=device)])


def _add(totals: Totals, name: str, value: float, weight: float) -> None:
    """Add to the sum of a metric and to the sum of its weights."""
    before = totals.get(name, (0.0, 0.0))
    totals[name] = (before[0] + value, before[1] + weight)
