"""The folder of a trained model that serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.atomic import new_folder
from data.errors import ConfigError
from data.settings import LoraConfig
from retriever_server.encoders.checks import outer_transformers
from retriever_server.encoders.read_spec import read_spec
from retriever_server.encoders.spec import EncodingSpec
from retriever_server.training.training_checks import check_saved, save_encoder


def export(model: Any, spec: EncodingSpec | None, folder: Path) -> Path:
    """Write the model that serves, adapters merged, to `folder`, whole or not at all; it is loaded once.

    Raises DataError where what loads from there gives other vectors.
    """
    merge_adapters(model)
    model.eval()
    with new_folder(folder) as partial:
        if spec is None:
            model.save_pretrained(str(partial), create_model_card=False)
            return folder
        save_encoder(model, spec, partial)
        check_saved(model, spec, partial)
        for name, part in getattr(model[-1], "parts", lambda _: {})(model).items():  # M3 is three encoders
            of = read_spec(name, part, spec.passage_template, spec.inputs)
            save_encoder(part, of, partial / name)
    return folder


def add_adapters(model: Any, lora: LoraConfig) -> None:
    """Put LoRA adapters into the transformers of a model, and freeze all else of them. Raises ConfigError."""
    from peft import LoraConfig as Adapter

    names = lora.target_modules
    targets = names if names == "all-linear" else [name.strip() for name in names.split(",")]
    adapter = Adapter(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft takes fractions
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias="none",
    )
    try:
        for transformer in outer_transformers(model):
            transformer.add_adapter(adapter)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules = {names!r}: {str(error).partition('.')[0]}") from error


def merge_adapters(model: Any) -> None:
    """Add what LoRA adapters have learned to the weights they stand beside, and take them away."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, BaseTunerLayer):
                layer.merge()
                setattr(parent, name, layer.get_base_layer())
    for transformer in outer_transformers(model):
        if getattr(transformer, "_hf_peft_config_loaded", False):
            transformer._hf_peft_config_loaded = False
            del transformer.peft_config
