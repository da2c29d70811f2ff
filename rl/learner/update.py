"""Rewarded groups in, one or more optimiser updates out, for the policy and, with PPO, its critic.

A loss is averaged over the *global* batch, however it is cut into micro-batches and processes.
Trajectories whose advantages are zero have no gradient without a KL or entropy term: they are not fed
through the model, but they stay in the denominator.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from agent.trajectory import Segment, SegmentKind, StopReason, Trajectory
from data.records import Question
from rl.algorithm.credit import Batch, credit
from rl.algorithm.importance import mismatch, sampler_weights
from rl.algorithm.losses import (
    KL_ESTIMATORS,
    SURROGATES,
    PolicyTokens,
    clamped,
    clip_fraction,
    kl_clamped,
    token_weights,
    value_loss,
)
from rl.learner.batch import MicroBatch, micro_batches
from rl.learner.lora import without_adapters
from rl.learner.workers import Workers

if TYPE_CHECKING:
    from rl.config import TrainConfig
    from rl.learner.critic import Critic
    from rl.learner.logprobs import Scorer
    from rl.learner.optimizer import Optimizer
    from rl.rollouts import Group, Totals

logger = logging.getLogger(__name__)

Measure = Callable[[MicroBatch], Tensor]
"""What a model says of each trained token of a micro-batch (N,)."""


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
        batch, algorithm = Batch(groups, self.scorer.model.device), self.config.algorithm
        self._score(batch)
        totals = credit(batch, self.config, self.workers, self.token_limit)
        for part in range(algorithm.updates_per_rollout):
            rows = batch.part(part, algorithm.updates_per_rollout, count)
            if self.critic is None or step >= algorithm.critic_only_steps:
                self._update_policy(batch, rows, totals)
            if self.critic is not None:
                self._update_critic(batch, rows, totals)
        for name in ("policy/clamped_fraction", "policy/kl_clamped_fraction"):
            beyond, tokens = totals.get(name, (0.0, 0.0))
            if beyond:
                logger.warning("%d of %d tokens have a log-ratio beyond its bound (%s)", beyond, tokens, name)
        return totals

    @torch.no_grad()
    def _score(self, batch: Batch) -> None:
        """Add what must be known of the batch before the first update changes the policy."""
        algorithm, reference = self.config.algorithm, self.reference
        if algorithm.updates_per_rollout > 1 or (reference and algorithm.kl_in == "reward"):
            batch.columns["old"] = self._measured(batch, self._logprobs)
        if reference is not None:
            with without_adapters(reference.model) if self.config.lora.rank else nullcontext():
                batch.columns["reference"] = self._measured(batch, lambda each: reference(each).logprobs)
        if self.critic is not None:
            batch.columns["values"] = self._measured(batch, self.critic)

    def _measured(self, batch: Batch, measure: Measure) -> list[Tensor]:
        """One tensor (tokens,) a trajectory."""
        found: dict[int, Tensor] = {}
        for each in self._micro_batches(batch, range(len(batch.trajectories))):
            parts = measure(each).split(each.counts.tolist())
            found.update(zip(each.rows, parts, strict=bool(each.rows)))
        return [found[row] for row in range(len(batch.trajectories))]

    def _update_policy(self, batch: Batch, rows: Sequence[int], totals: Totals) -> None:
        """One update of the policy on its share of the batch."""
        algorithm, advantages = self.config.algorithm, batch.columns["advantages"]
        tokens, trajectories = self._everywhere(sum(len(advantages[row]) for row in rows), len(rows))
        kl_in_loss = "reference" in batch.columns and algorithm.kl_in == "loss"
        always = kl_in_loss or algorithm.entropy_coefficient > 0
        fed = [row for row in rows if always or advantages[row].any()]
        if not self._everywhere(len(fed))[0]:
            return
        constant = algorithm.averaging_tokens or self.token_limit

        def loss_of(each: MicroBatch) -> Tensor:
            loss = self._token_losses(batch, each, kl_in_loss, totals)
            weights = token_weights(algorithm.averaging, each.counts, tokens, trajectories, constant)
            return (weights.to(loss.device) * loss).sum()

        loss = self._accumulate(batch, fed, loss_of, self._logprobs)
        _add(totals, "policy/loss", loss, 1 / self.workers.count)
        _add(totals, "policy/grad_norm", self._step(self.scorer, self.optimizer), 1)

    def _token_losses(self, batch: Batch, each: MicroBatch, kl_in_loss: bool, totals: Totals) -> Tensor:
        """The loss of each token of a micro-batch (N,); its metrics go into the totals."""
        algorithm, device = self.config.algorithm, batch.device
        taken = self.scorer(each, entropy_gradient=algorithm.entropy_coefficient > 0)
        old = batch.joined("old", each.rows) if "old" in batch.columns else taken.logprobs.detach()
        sampler, sampled = each.sampler_logprobs.to(device), each.sampled.to(device)
        row, count = each.row.to(device), taken.logprobs.numel()
        tokens = PolicyTokens(taken.logprobs, old, batch.joined("advantages", each.rows), row)
        trust = sampler_weights(algorithm.importance, algorithm.importance_cap, old, sampler, row, sampled)
        loss = SURROGATES[algorithm.surrogate](tokens, algorithm) * trust
        for name, value in mismatch(old, sampler, sampled).items():
            _add(totals, f"policy/sampler_{name}", value, int(sampled.sum()))
        _add(totals, "policy/importance_weight", float(trust.sum()), count)
        _add(totals, "policy/clip_fraction", float(clip_fraction(tokens, algorithm)) * count, count)
        _add(totals, "policy/clamped_fraction", clamped(tokens, algorithm), count)
        _add(totals, "policy/entropy", float(taken.entropy.detach().sum()), count)
        if kl_in_loss:
            both = taken.logprobs, batch.joined("reference", each.rows)
            kl = KL_ESTIMATORS[algorithm.kl_estimator](*both)
            _add(totals, "policy/kl", float(kl.detach().sum()), count)
            _add(totals, "policy/kl_clamped_fraction", kl_clamped(algorithm.kl_estimator, *both), count)
            loss = loss + algorithm.kl_coefficient * kl
        if algorithm.entropy_coefficient:
            loss = loss - algorithm.entropy_coefficient * taken.entropy
        return loss

    def _update_critic(self, batch: Batch, rows: Sequence[int], totals: Totals) -> None:
        """One update of the critic: its values of policy tokens towards their returns."""
        assert self.critic is not None and self.critic_optimizer is not None
        critic, clip = self.critic, self.config.algorithm.value_clip
        (tokens,) = self._everywhere(sum(len(batch.columns["returns"][row]) for row in rows))
        if not tokens:
            return

        def loss_of(each: MicroBatch) -> Tensor:
            old, returns = (batch.joined(name, each.rows) for name in ("values", "returns"))
            return value_loss(critic(each), old, returns, clip).sum() / tokens

        loss = self._accumulate(batch, rows, loss_of, critic)
        _add(totals, "critic/loss", loss, 1 / self.workers.count)
        _add(totals, "critic/grad_norm", self._step(critic, self.critic_optimizer), 1)

    def _accumulate(self, batch: Batch, rows: Sequence[int], loss_of: Measure, idle: Measure) -> float:
        """Add up the gradients of these rows; returns their loss. `idle` takes part without any."""
        total = 0.0
        # FSDP averages gradients over the processes, where the loss is a share of the global average.
        scale = self.workers.count if self.sharded else 1
        for each in self._micro_batches(batch, rows):
            loss = loss_of(each) if each.rows else idle(each).sum() * 0
            if not loss.isfinite():  # its gradient may be: as it is now, no process takes this update
                loss = loss * torch.nan
            (loss * scale).backward()
            total += float(loss.detach())
        return total

    def _step(self, module: nn.Module, optimizer: Optimizer) -> float:
        if not self.sharded:
            self.workers.sum_gradients(p for p in module.parameters() if p.requires_grad)
        return optimizer.update()

    def _logprobs(self, each: MicroBatch) -> Tensor:
        return self.scorer(each).logprobs

    def _everywhere(self, *counts: int) -> list[int]:
        """Counts, summed over the processes."""
        return [int(total) for total in self.workers.sum(torch.tensor(counts, dtype=torch.float64))]

    @property
    def sharded(self) -> bool:
        """Whether a forward pass of one process needs all the others."""
        return self.workers.count > 1 and self.config.sharding == "fsdp"

    def _micro_batches(self, batch: Batch, rows: Sequence[int]) -> Iterator[MicroBatch]:
        """The rows in micro-batches; where weights are shared out, as many as any process has."""
        config = self.config
        cut = list(
            micro_batches(
                batch.trajectories,
                rows,
                config.micro_batch_tokens,
                config.packing,
                train_observations=not config.mask_observations,
            )
        )
        if self.sharded:  # agreed on before the first of them, for every pass asks all processes
            idle = replace(next(micro_batches([_NOTHING], [0], 2)), rows=[])
            cut += [idle] * (max(self.workers.gather(len(cut))) - len(cut))
        yield from cut


_NOTHING = Trajectory(
    Question("nothing", "", ()),
    [Segment(SegmentKind.PROMPT, [0], ""), Segment(SegmentKind.POLICY, [0], "", [None])],
    StopReason.ANSWERED,
)
"""Fed where a process has less to do than another, for its part in sharing out the weights."""


def _add(totals: Totals, name: str, value: float, weight: float) -> None:
    """Add to the sum of a metric and to the sum of its weights."""
    before = totals.get(name, (0.0, 0.0))
    totals[name] = (before[0] + value, before[1] + weight)
