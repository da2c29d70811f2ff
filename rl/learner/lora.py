"""LoRA by peft inside the policy's own modules: the model stays the object that engine and trainer hold.

Adapters have the dtype of the layer they sit in; under bfloat16 the optimiser's float32 copies keep the
small updates. Their start depends on the seed alone.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from data.errors import DataError
from data.models.lora import ADAPTER, add_adapters
from data.models.sharding import copy_whole, whole

if TYPE_CHECKING:
    from data.settings import LoraConfig


def add_lora(model: PreTrainedModel, config: LoraConfig, seed: int = 0) -> None:
    """Put adapters into `model` in place (peft) and freeze all else; with rank 0 nothing is done."""
    if config.rank:
        add_adapters(model, config, seed)


@contextmanager
def without_adapters(model: nn.Module) -> Generator[None]:
    """The reference policy, inside: the weights that training started from."""
    layers = _adapted(model).values()
    if not layers:
        raise ValueError("without_adapters: the model has no adapters, so it is its own reference")
    for layer in layers:
        layer.enable_adapters(False)
    for parameter in _parameters(model).values():
        parameter.requires_grad_()  # peft froze them; FSDP would take them for frozen if it saw it first
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextmanager
def training_dropout(model: nn.Module) -> Generator[None]:
    """Dropout on the adapters' input, inside, by torch's generator; the model stays in evaluation mode."""
    dropouts = nn.ModuleList(layer.lora_dropout for layer in _adapted(model).values())
    dropouts.train()
    try:
        yield
    finally:
        dropouts.eval()


def merged_state(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state dict as it would be without LoRA: W + alpha/rank B A, in float32 and rounded once.

    state: the model's where it lies elsewhere (gathered from shards; may be empty). Nothing given is
    changed; weights without an adapter are not copied.
    """
    state = model.state_dict() if state is None else state
    merged = {n.replace(".base_layer.", "."): w.detach() for n, w in state.items() if ".lora_" not in n}
    for name, layer in _adapted(model).items():
        if (weight := merged.get(f"{name}.weight")) is not None:
            low, high = (state[f"{name}.lora_{side}.{ADAPTER}.weight"].detach().float() for side in "AB")
            change = (high @ low) * layer.scaling[ADAPTER]
            total = weight.float() + (change.T if layer.fan_in_fan_out else change)
            merged[f"{name}.weight"] = total.to(weight.dtype)
    return merged


def merged_copy(model: nn.Module) -> Any:
    """A copy of a module with its adapters merged into its weights, all of which can be trained."""
    twin = copy.deepcopy(model)
    state = merged_state(twin)
    for name, layer in _adapted(twin).items():
        twin.set_submodule(name, layer.get_base_layer())
    twin.load_state_dict(state)
    return twin.requires_grad_()


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' weights by name; what `load_adapter_state` takes. Empty without adapters."""
    return {name: p.detach() for name, p in _parameters(model).items()}


def scaled_adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' whole weights by name, B times alpha/rank: their product is what is added to a weight."""
    scales = {name: layer.scaling[ADAPTER] for name, layer in _adapted(model).items()}
    found = {name: whole(parameter.detach()) for name, parameter in _parameters(model).items()}
    return {n: w * scales[n.split(".lora_B.")[0]] if ".lora_B." in n else w for n, w in found.items()}


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Take over what `adapter_state` gave; DataError, with nothing changed, from other adapters."""
    copy_state(adapter_state(model), state, "adapters of another lora.rank or lora.target_modules")


def copy_state(own: Mapping[str, Tensor], found: Mapping[str, Tensor], complaint: str) -> None:
    """Write tensors into those of the same names, which may be sharded; DataError unless shapes agree."""
    for name in sorted(own.keys() | found.keys()):
        shapes = [list(state[name].shape) if name in state else "absent" for state in (found, own)]
        if shapes[0] != shapes[1]:
            raise DataError(f"{complaint}: {name} is {shapes[0]}, must be {shapes[1]}")
    for name, tensor in own.items():
        copy_whole(tensor, found[name])


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def _adapted(model: nn.Module) -> dict[str, Any]:
    """Layers with an adapter by name (peft's own class, which is not imported to find out)."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
