"""Weights that are divided over the processes of a training (FSDP2), and how such a process ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def layers_of(module: nn.Module) -> list[Any]:
    """Return the layers of transformers in a module: what is divided, or computed again, one by one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [each for each in module.modules() if isinstance(each, GradientCheckpointingLayer)]


def shard(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Divide the parameters of a module over all processes, layer by layer (FSDP2); compute in `dtype`."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in [*layers_of(module), module]:
        fully_shard(layer, mp_policy=policy)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor whole: all processes must ask for one that is divided; others are as they are."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather else tensor


def gather(tensors: Mapping[str, Tensor], keep: bool, on_host: bool = True) -> dict[str, Tensor]:
    """Return the full tensors where `keep`, else none; all processes must ask.

    Those that are divided become whole one after the other, and with `on_host` go to host memory: a device
    need not hold more than one beside the shares. Others are not copied.
    """
    kept = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if keep:
            kept[name] = full.cpu() if on_host and full is not tensor else full
    return kept


@torch.no_grad()
def copy_whole(target: Tensor, source: Tensor) -> None:
    """Write a full tensor into one that may be divided over the processes."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
    target.copy_(source)


def end_at_once() -> None:
    """End this process, its work done, without the interpreter's last steps.

    gloo's threads outlive its process groups, and an interpreter that ends beside them now and then aborts.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
