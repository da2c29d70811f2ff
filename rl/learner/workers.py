"""The processes of one run, and what they must agree on. Alone, every answer is one's own.

`accelerate launch --num_processes N -m scripts train ...` (or torchrun) starts them. Gradients are summed
once an update: processes may have different numbers of micro-batches, or none.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.models.sharding import end_at_once

TIMEOUT = timedelta(hours=2)
"""The longest that one process may wait for the others, who may be evaluating."""

Totals = dict[str, tuple[float, float]]
"""Metrics that can still be averaged over processes: the sum of the values, and of their weights."""


@dataclass(frozen=True)
class Workers:
    """This process's place among those of the run."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Return whether this process writes the run folder."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def average(self, parts: Sequence[Totals]) -> dict[str, float]:
        """Average what all processes measured in parts of a step; what nobody measured is left out."""
        return averages([part for of_one in self.gather(parts) for part in of_one])

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over the processes; the argument is unchanged."""
        if self.count == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients in place; a process that fed nothing adds zeros."""
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.count > 1:
            dist.barrier()

    def leave(self) -> None:
        """End the process group, in all processes: a process that just exits may abort the others."""
        if self.count > 1:
            dist.destroy_process_group()

    def exit(self) -> None:
        """End a process that is one of several, its work done."""
        if self.count > 1:
            end_at_once()


def averages(parts: Sequence[Totals]) -> dict[str, float]:
    """Average metrics over parts of a step or processes; what nobody measured is left out."""
    sums: Totals = {}
    for part in parts:
        for name, (value, weight) in part.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + value, before[1] + weight)
    return {name: value / weight for name, (value, weight) in sums.items() if weight}


def join_workers() -> Workers:
    """This process's place, from what its launcher set; the process group is started if there are several."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Workers()
    if not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    return Workers(dist.get_rank(), count)
