"""LoRA adapters of peft, put into a model of transformers in place: a policy, or the trunk of an encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data.errors import require

if TYPE_CHECKING:
    from data.settings import LoraConfig

ADAPTER = "default"
"""The name that peft gives an adapter."""


def add_adapters(model: Any, config: LoraConfig, seed: int = 0) -> None:
    """Put adapters into a PreTrainedModel and freeze all else of it.

    They start as no change at all (B is zero), and depend on the seed alone. Raises ConfigError for a target
    that is no linear layer of the model; the LM head is none (it may be tied to the embedding).
    """
    import peft  # late: it takes seconds
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    kinds = (torch.nn.Linear, Conv1D)
    linear = [name for name, layer in model.named_modules() if isinstance(layer, kinds) and layer is not head]
    known = sorted({name.rpartition(".")[2] for name in linear})
    asked = [name.strip() for name in config.target_modules.split(",")]
    targets = known if asked == ["all-linear"] else asked
    allowed = f"all-linear, or some of {','.join(known)}"
    require(set(targets) <= set(known), "lora.target_modules", config.target_modules, allowed)
    adapters = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # a float will do
        lora_dropout=config.dropout,
        target_modules=targets,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(adapters, model, ADAPTER)
    model.train(model.training)  # the new modules, too
