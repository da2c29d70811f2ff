"""AdamW over a model, with its state as named tensors: it goes to disk as safetensors, nothing is unpickled.

Weights in bfloat16 have a copy in float32 that is the one updated: at the learning rates of RL an
update is smaller than the distance between two bfloat16 numbers, and would be rounded away.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from data.models.sharding import copy_whole, whole
from rl.algorithm.presets import AlgorithmConfig


class Optimizer:
    """Clips the gradient, warms up the learning rate, steps AdamW."""

    def __init__(
        self, model: nn.Module, config: AlgorithmConfig, learning_rate: float, warmup_updates: int = 0
    ) -> None:
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._masters = {
            name: p if p.dtype is torch.float32 else p.detach().float() for name, p in self._weights.items()
        }
        self._max_grad_norm, self._warmup_updates = config.max_grad_norm, warmup_updates
        self._learning_rate = learning_rate
        self.decay = 1.0
        """Factor of the learning rate, beside that of the warm-up."""
        self._adamw = torch.optim.AdamW(
            self._masters.values(), self._learning_rate, (0.9, 0.95), weight_decay=config.weight_decay
        )
        self._updates = 0

    def update(self) -> float:
        """Apply the accumulated gradient and clear it; returns its norm before clipping.

        A gradient that is not finite changes nothing: the norm tells.
        """
        for name, weight in self._weights.items():
            if self._masters[name] is not weight and weight.grad is not None:
                self._masters[name].grad, weight.grad = weight.grad.float(), None
        norm = whole(torch.nn.utils.clip_grad_norm_(self._masters.values(), self._max_grad_norm))
        if torch.isfinite(norm):
            self._updates += 1
            warm = min(1.0, self._updates / max(1, self._warmup_updates))
            for group in self._adamw.param_groups:
                group["lr"] = self._learning_rate * warm * self.decay
            self._adamw.step()
            self._copy_masters()
        self._adamw.zero_grad(set_to_none=True)
        return float(norm)

    def state(self) -> dict[str, Tensor]:
        """The moments and the float32 copies by parameter name, shared out as they are; number of updates."""
        tensors = {"updates": torch.tensor(self._updates)}
        for name, master in self._masters.items():
            if master is not self._weights[name]:
                tensors[f"master/{name}"] = master
            for key, value in self._adamw.state.get(master, {}).items():
                tensors[f"{key}/{name}"] = value
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave; the weights themselves are the policy's to load."""
        self._updates = int(tensors["updates"])
        self._adamw.state.clear()
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "master":
                copy_whole(self._masters[name], value)
            elif name:
                self._adamw.state[self._masters[name]][kind] = self._like(self._masters[name], kind, value)

    def _like(self, master: Tensor, kind: str, value: Tensor) -> Tensor:
        if kind == "step":
            return value
        moment = torch.empty_like(master, requires_grad=False)
        copy_whole(moment, value)
        return moment

    @torch.no_grad()
    def _copy_masters(self) -> None:
        for name, weight in self._weights.items():
            if self._masters[name] is not weight:
                weight.copy_(self._masters[name])
