"""AdamW over a policy, and its state on disk as safetensors: nothing is unpickled."""

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
        self._names = [name for name, p in model.named_parameters() if p.requires_grad]
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._config = config
        self._adamw = torch.optim.AdamW(
            self._parameters, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay
        )
        self._updates = 0

    def update(self) -> float:
        """Apply the accumulated gradient and clear it; returns its norm before clipping.

        A gradient that is not finite changes nothing: the norm tells.
        """
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._config.max_grad_norm)
        if torch.isfinite(norm):
            self._updates += 1
            warm = min(1.0, self._updates / max(1, self._config.warmup_steps))
            for group in self._adamw.param_groups:
                group["lr"] = self._config.learning_rate * warm
            self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        return float(norm)

    def save(self, folder: Path) -> None:
        """Write the moments by parameter name, and the number of updates."""
        tensors = {"updates": torch.tensor(self._updates)}
        for name, parameter in zip(self._names, self._parameters, strict=True):
            for key, value in self._adamw.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value
        save_file(tensors, folder / STATE_FILE)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        tensors = load_file(folder / STATE_FILE)
        self._updates = int(tensors.pop("updates"))
        by_name = dict(zip(self._names, self._parameters, strict=True))
        for key, value in tensors.items():
            kind, name = key.split("/", 1)
            parameter = by_name[name]
            moved = value if kind == "step" else value.to(parameter.device)
            self._adamw.state[parameter][kind] = moved
