"""Trajectories -> tensors: right-padded micro-batches of about equal token count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agent.trajectory import Trajectory


@dataclass(frozen=True)
class MicroBatch:
    """A few trajectories, padded on the right; position t of the mask speaks of token t."""

    rows: list[int]
    """Where each trajectory stands in the batch it was made from."""
    token_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T), 1 where there is a token
    loss_mask: Tensor  # (B, T) bool, True where the token is trained
    sampler_logprobs: Tensor  # (B, T), 0 where not sampled

    @property
    def counts(self) -> Tensor:
        """Trained tokens of each trajectory (B,)."""
        return self.loss_mask.sum(1)


def micro_batches(
    trajectories: Sequence[Trajectory], rows: Sequence[int], max_tokens: int, train_observations: bool = False
) -> Iterator[MicroBatch]:
    """The given rows in micro-batches of at most `max_tokens` padded tokens, longest first.

    A trajectory longer than `max_tokens` has a micro-batch of its own. `train_observations` puts
    observation tokens into the loss mask as well (a control experiment).
    """
    lengths = {row: len(trajectories[row].token_ids) for row in rows}
    pending = sorted(rows, key=lambda row: -lengths[row])
    while pending:
        size = max(1, max_tokens // lengths[pending[0]])
        yield _pad(trajectories, pending[:size], train_observations)
        pending = pending[size:]


def _pad(trajectories: Sequence[Trajectory], rows: list[int], train_observations: bool) -> MicroBatch:
    chosen = [trajectories[row] for row in rows]
    width = max(len(t.token_ids) for t in chosen)

    def stack(columns: list[list], dtype: torch.dtype) -> Tensor:
        return torch.tensor([column + [0] * (width - len(column)) for column in columns], dtype=dtype)

    def mask(trajectory: Trajectory) -> list[int]:
        if not train_observations:
            return trajectory.loss_mask
        prompt = len(trajectory.segments[0].token_ids)
        return [0] * prompt + [1] * (len(trajectory.token_ids) - prompt)

    return MicroBatch(
        rows,
        token_ids=stack([t.token_ids for t in chosen], torch.long),
        attention_mask=stack([[1] * len(t.token_ids) for t in chosen], torch.long),
        loss_mask=stack([mask(t) for t in chosen], torch.bool),
        sampler_logprobs=stack([t.logprobs for t in chosen], torch.float32),
    )
