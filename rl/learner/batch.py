"""Trajectories -> micro-batches of a token budget, packed one after another or padded on the right.

Whatever the layout, what is trained is read row by row as one flat sequence: the N trained tokens of
the first trajectory, then those of the second, and so on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from agent.trajectory import SegmentKind, Trajectory

if TYPE_CHECKING:
    from agent.trajectory import Picture


@dataclass(frozen=True)
class MicroBatch:
    """B trajectories for one forward and backward pass; position t of a mask speaks of token t.

    Packed (R=1, no attention mask) or padded (R=B). N is the number of trained tokens.
    """

    rows: list[int]
    """Row of each trajectory in the batch it was made from."""
    token_ids: Tensor  # (R, T)
    position_ids: Tensor  # (R, T), from 0 in every trajectory
    attention_mask: Tensor | None  # (R, T), 1 where there is a token; None where packed
    lengths: list[int]
    """Tokens of each trajectory."""
    loss_mask: Tensor  # (R, T) bool, True where the token is trained
    sampler_logprobs: Tensor  # (N,), of no meaning where `sampled` is False
    sampled: Tensor  # (N,) bool, False where the sampler did not draw the token (observations, if trained)
    counts: Tensor  # (B,) long, trained tokens of each trajectory
    row: Tensor  # (N,) long, which of its trajectories, 0..B-1, each trained token belongs to
    pictures: list[Picture] = field(default_factory=list)
    """Images that the policy was shown; `start` counts in the flattened rows."""


def micro_batches(
    trajectories: Sequence[Trajectory],
    rows: Sequence[int],
    max_tokens: int,
    packing: bool = True,
    train_observations: bool = False,
) -> Iterator[MicroBatch]:
    """The given rows in micro-batches of at most `max_tokens` tokens, padding included, longest first.

    A trajectory longer than `max_tokens` has a micro-batch of its own. `train_observations` puts
    observation tokens into the loss mask as well (a control experiment).
    """
    token_ids = {row: trajectories[row].token_ids for row in rows}
    lengths = {row: len(ids) for row, ids in token_ids.items()}
    longest_first = sorted(rows, key=lambda row: -lengths[row])
    cut = _bins if packing else _slices
    for chosen in cut(longest_first, lengths, max_tokens):
        ids = [token_ids[row] for row in chosen]
        yield _micro_batch([trajectories[row] for row in chosen], chosen, ids, packing, train_observations)


def _bins(rows: list[int], lengths: dict[int, int], max_tokens: int) -> list[list[int]]:
    """First fit: each row into the first bin that has room for it."""
    bins: list[list[int]] = []
    room: list[int] = []
    for row in rows:
        fits = next((i for i, left in enumerate(room) if lengths[row] <= left), None)
        if fits is None:
            bins.append([])
            room.append(max_tokens)
            fits = -1
        bins[fits].append(row)
        room[fits] -= lengths[row]
    return bins


def _slices(rows: list[int], lengths: dict[int, int], max_tokens: int) -> Iterator[list[int]]:
    """As many rows at a time as fit when all are padded to the first."""
    while rows:
        size = max(1, max_tokens // lengths[rows[0]])
        yield rows[:size]
        rows = rows[size:]


def _micro_batch(
    chosen: Sequence[Trajectory],
    rows: list[int],
    token_ids: list[list[int]],
    packing: bool,
    train_observations: bool,
) -> MicroBatch:
    lengths = list(map(len, token_ids))
    masks = [_loss_mask(t, train_observations) for t in chosen]
    counts = torch.tensor([sum(mask) for mask in masks])

    def lay(columns: Sequence[Sequence[int]], dtype: torch.dtype = torch.long) -> Tensor:
        if packing:
            return torch.tensor([[value for column in columns for value in column]], dtype=dtype)
        width = max(lengths)
        return torch.tensor([[*column, *[0] * (width - len(column))] for column in columns], dtype=dtype)

    logprobs = [
        value
        for t, mask in zip(chosen, masks, strict=True)
        for value, trained in zip(t.logprobs, mask, strict=True)
        if trained
    ]
    starts = accumulate(lengths, initial=0) if packing else range(0, len(rows) * max(lengths), max(lengths))
    pictures = [
        replace(picture, start=start + picture.start)
        for t, start in zip(chosen, starts, strict=False)
        for picture in t.pictures
    ]
    return MicroBatch(
        rows,
        token_ids=lay(token_ids),
        position_ids=lay([range(length) for length in lengths]),
        attention_mask=None if packing else lay([[1] * length for length in lengths]),
        lengths=lengths,
        loss_mask=lay(masks, torch.bool),
        sampler_logprobs=torch.tensor([value or 0.0 for value in logprobs], dtype=torch.float32),
        sampled=torch.tensor([value is not None for value in logprobs], dtype=torch.bool),
        counts=counts,
        row=torch.arange(len(counts)).repeat_interleave(counts),
        pictures=pictures,
    )


def _loss_mask(trajectory: Trajectory, train_observations: bool) -> list[int]:
    """1 where the token is trained; never at the first, which nothing predicts."""
    trained = (SegmentKind.POLICY, SegmentKind.OBSERVATION) if train_observations else (SegmentKind.POLICY,)
    mask = [int(segment.kind in trained) for segment in trajectory.segments for _ in segment.token_ids]
    return [0, *mask[1:]]
