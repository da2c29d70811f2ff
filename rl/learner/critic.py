"""The critic of PPO: a trunk of its own, started as the policy's, and a linear value head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from agent.vision import Vision
from data.errors import DataError
from rl.learner.logprobs import hidden_states
from rl.learner.lora import copy_state, merged_copy

if TYPE_CHECKING:
    from rl.learner.batch import MicroBatch

HEAD_FILE = "value_head.safetensors"


class ValueHead(nn.Linear):
    """Hidden states (N, H) -> values (N,) in float32, whatever the dtype of its weights; 0 at first."""

    def reset_parameters(self) -> None:
        """Start from nothing, so that the first values say nothing."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input.float(), self.weight.float(), self.bias.float())[:, 0]


class Critic(nn.Module):
    """Values of the states in which the policy chose its tokens.

    The head has the dtype of the trunk, so that both can be sharded as one. All weights are trained,
    whether or not the policy has adapters.
    """

    def __init__(self, trunk: PreTrainedModel, vision: Vision | None = None) -> None:
        super().__init__()
        self.trunk, self.vision = trunk, vision
        size = trunk.config.get_text_config().hidden_size
        self.head = ValueHead(size, 1, device=trunk.device, dtype=trunk.dtype)

    @classmethod
    def from_policy(cls, model: PreTrainedModel, vision: Vision | None = None) -> Critic:
        """A critic whose trunk is a copy of the policy's (adapters merged): same dtype, device and mode."""
        return cls(merged_copy(model.base_model), vision).train(model.training)

    def forward(self, batch: MicroBatch) -> Tensor:
        """Values (N,) in float32 of the states before each trained token of a micro-batch."""
        return self.head(hidden_states(self.trunk, batch, self.vision))

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the trunk as `AutoModel.from_pretrained` reads it, and the head beside it.

        state: this module's state dict where it lies elsewhere (gathered from shards).
        """
        state = self.state_dict() if state is None else state
        trunk, head = (
            {n.removeprefix(part): t for n, t in state.items() if n.startswith(part)}
            for part in ("trunk.", "head.")
        )
        self.trunk.save_pretrained(folder, state_dict=trunk)
        save_file(head, folder / HEAD_FILE)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; DataError, with nothing changed, where it is no critic of this shape."""
        own, dtype = self.state_dict(), self.trunk.dtype
        try:
            head = load_file(folder / HEAD_FILE)
            trunk, report = AutoModel.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise DataError(f"{folder}: no critic that can be read: {reason}") from error
        found = {f"trunk.{n}": t for n, t in trunk.state_dict().items() if n not in report["missing_keys"]}
        copy_state(own, found | {f"head.{n}": t for n, t in head.items()}, f"{folder}: another critic")
