"""AdamW over a policy, and its state on disk as safetensors: nothing is unpickled.

Weights in bfloat16 have a copy in float32 that is the one updated: at the learning rates of RL an
update is smaller than the distance between two bfloat16 numbers, and would be rounded away.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from rl.config import AlgorithmConfig

STATE_FILE = "optimizer.safetensors"


class Optimizer:
    """Clips the gradient, warms up the learning rate, steps AdamW."""

    def __init__(self, model: PreTrainedModel, config: AlgorithmConfig) -> None:
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._masters = {
            name: p if p.dtype is torch.float32 else p.detach().float() for name, p in self._weights.items()
        }
        self._config = config
        self._adamw = torch.optim.AdamW(
            self._masters.values(), config.learning_rate, (0.9, 0.95), weight_decay=config.weight_decay
        )
        self._updates = 0

    def update(self) -> float:
        """Apply the accumulated gradient and clear it; returns its norm before clipping.

        A gradient that is not finite changes nothing: the norm tells.
        """
        for name, weight in self._weights.items():
            if self._masters[name] is not weight and weight.grad is not None:
                self._masters[name].grad, weight.grad = weight.grad.float(), None
        norm = torch.nn.utils.clip_grad_norm_(self._masters.values(), self._config.max_grad_norm)
        if torch.isfinite(norm):
            self._updates += 1
            warm = min(1.0, self._updates / max(1, self._config.warmup_steps))
            for group in self._adamw.param_groups:
                group["lr"] = self._config.learning_rate * warm
            self._adamw.step()
            self._copy_masters()
        self._adamw.zero_grad(set_to_none=True)
        return float(norm)

    def save(self, folder: Path) -> None:
        """Write the moments and the float32 copies by parameter name, and the number of updates."""
        tensors = {"updates": torch.tensor(self._updates)}
        for name, master in self._masters.items():
            if master is not self._weights[name]:
                tensors[f"master/{name}"] = master
            for key, value in self._adamw.state.get(master, {}).items():
                tensors[f"{key}/{name}"] = value
        save_file(tensors, folder / STATE_FILE)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; the weights themselves are the policy's to load."""
        tensors = load_file(folder / STATE_FILE)
        self._updates = int(tensors.pop("updates"))
        for key, value in tensors.items():
            kind, name = key.split("/", 1)
            master = self._masters[name]
            if kind == "master":
                master.copy_(value)
            else:
                self._adamw.state[master][kind] = value if kind == "step" else value.to(master.device)

    @torch.no_grad()
    def _copy_masters(self) -> None:
        for name, weight in self._weights.items():
            if self._masters[name] is not weight:
                weight.copy_(self._masters[name])
