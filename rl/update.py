"""Trajectories with advantages in, one or more optimiser updates out.

The loss is averaged over all policy tokens of the *global* mini-batch, however it is cut into
micro-batches (DAPO, arXiv 2503.14476, eq. 8). Trajectories whose advantage is zero have no gradient
without a KL term: they are not fed through the model, but their tokens stay in the denominator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from agent.trajectory import Trajectory
from rl.batch import MicroBatch, micro_batches
from rl.config import TrainConfig
from rl.logprobs import token_logprobs
from rl.losses import clip_fraction, k3, ppo_clip
from rl.optimizer import Optimizer


@dataclass(frozen=True)
class Updater:
    """What an update needs besides the batch."""

    model: PreTrainedModel
    optimizer: Optimizer
    config: TrainConfig
    reference: PreTrainedModel | None = None
    """The policy to stay near; None without a KL term."""

    def update(self, trajectories: Sequence[Trajectory], advantages: Tensor) -> dict[str, float]:
        """`updates_per_rollout` optimiser updates over the batch; returns the metrics of the policy.

        advantages (B,). Groups are contiguous and stay together in a mini-batch.
        """
        count = self.config.algorithm.updates_per_rollout
        old = self._old_logprobs(trajectories) if count > 1 else {}
        totals: dict[str, list[tuple[float, float]]] = {}
        for part in _split(len(trajectories), self.config.rollout.group_size, count):
            for name, (value, weight) in self._mini_batch(trajectories, part, advantages, old).items():
                totals.setdefault(name, []).append((value, weight))
        return {
            f"policy/{name}": sum(v * w for v, w in rows) / max(1e-9, sum(w for _, w in rows))
            for name, rows in totals.items()
        }

    def _mini_batch(
        self,
        trajectories: Sequence[Trajectory],
        rows: Sequence[int],
        advantages: Tensor,
        old: dict[int, Tensor],
    ) -> dict[str, tuple[float, float]]:
        """One update; returns each metric with its weight."""
        denominator = sum(sum(self._mask(trajectories[row])) for row in rows)
        if self.reference is None:
            rows = [row for row in rows if advantages[row] != 0]
        sums: dict[str, float] = {}
        for batch in self._micro_batches(trajectories, rows):
            loss, metrics = self._loss(batch, advantages, old)
            (loss / max(1, denominator)).backward()
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value
        tokens = sums.pop("tokens", 0.0)
        averages = {name: (value / max(1.0, tokens), tokens) for name, value in sums.items()}
        norm = self.optimizer.update() if rows else 0.0
        return {"grad_norm": (norm, 1.0), **averages}

    def _loss(
        self, batch: MicroBatch, advantages: Tensor, old: dict[int, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """The summed loss of a micro-batch, and sums of metrics over its tokens."""
        algorithm = self.config.algorithm
        taken = token_logprobs(self.model, batch, self.config.rollout.temperature)
        device = taken.logprobs.device
        token_advantages = advantages[batch.rows].repeat_interleave(batch.counts).to(device)  # (N,)
        old_logprobs = (
            torch.cat([old[row] for row in batch.rows]).to(device) if old else taken.logprobs.detach()
        )
        bounds = (algorithm.clip_low, algorithm.clip_high)
        loss = ppo_clip(taken.logprobs, old_logprobs, token_advantages, *bounds).sum()
        tokens = taken.logprobs.numel()
        with torch.no_grad():
            cut = clip_fraction(taken.logprobs, old_logprobs, token_advantages, *bounds)
            mismatch = self._sampler_mismatch(batch, old_logprobs)
        metrics = {
            "tokens": float(tokens),
            "loss": float(loss.detach()),
            "entropy": float(taken.entropy.sum()),
            "clip_fraction": float(cut) * tokens,
            "sampler_difference": mismatch,
        }
        if self.reference is not None:
            with torch.no_grad():
                reference = token_logprobs(self.reference, batch, self.config.rollout.temperature)
            kl = k3(taken.logprobs, reference.logprobs).sum()
            loss = loss + algorithm.kl_coefficient * kl
            metrics["kl"] = float(kl.detach())
        return loss, metrics

    def _sampler_mismatch(self, batch: MicroBatch, old_logprobs: Tensor) -> float:
        """Sum of |sampler's - trainer's| log-prob over the tokens that the policy sampled."""
        sampler = batch.sampler_logprobs[batch.loss_mask].to(old_logprobs.device)
        return float(((sampler - old_logprobs).abs() * (sampler != 0)).sum())

    def _old_logprobs(self, trajectories: Sequence[Trajectory]) -> dict[int, Tensor]:
        """The trainer's log-probs of the policy that sampled, by row: the base of the ratio."""
        old = {}
        with torch.no_grad():
            for batch in self._micro_batches(trajectories, range(len(trajectories))):
                taken = token_logprobs(self.model, batch, self.config.rollout.temperature)
                parts = taken.logprobs.split(batch.counts.tolist())
                old.update(zip(batch.rows, parts, strict=True))
        return old

    def _micro_batches(self, trajectories: Sequence[Trajectory], rows: Sequence[int]):
        observed = not self.config.mask_observations
        return micro_batches(trajectories, rows, self.config.micro_batch_tokens, observed)

    def _mask(self, trajectory: Trajectory) -> list[int]:
        if self.config.mask_observations:
            return trajectory.loss_mask
        return [1] * (len(trajectory.token_ids) - len(trajectory.segments[0].token_ids))


def _split(count: int, group_size: int, parts: int) -> list[list[int]]:
    """Rows 0..count-1 in `parts` mini-batches of whole groups, none empty."""
    size = -(-(count // group_size) // parts) * group_size
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]
