"""Loads a policy: a folder, a hub name, or one that comes with Sleuth by a short name."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from agent.policy_folder import PROTOCOL_FILE, find_policy
from agent.protocol import Protocol
from agent.vision import IN_ONE_LINE, Vision, reads_pictures
from data.errors import ConfigError
from data.jsonl import write_json
from data.machine.device import choose_dtype, resolve_device

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Policy:
    """A causal language model and its tokenizer; one that also reads pictures has `vision`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vision: Vision | None = None

    def save(self, folder: Path, protocol: str | Protocol, state: dict[str, Tensor] | None = None) -> None:
        """Write safetensors, configuration and tokenizer; `from_pretrained` loads the folder as it is.

        sleuth.json beside them says which protocol the policy speaks. state: the weights, where
        they are not those of the model as it is (adapters merged, shards gathered).
        """
        self.model.save_pretrained(folder, state_dict=state)
        (self.vision.processor if self.vision else self.tokenizer).save_pretrained(folder)
        record = {"protocol": protocol} if isinstance(protocol, str) else protocol.record
        write_json(folder / PROTOCOL_FILE, record)


def load_policy(name: str, device: str = "auto", dtype: str = "auto") -> Policy:
    """Load a policy for inference or training, in evaluation mode.

    name: a folder, a hub name, or a short name. device: auto, cpu or cuda. dtype: auto (bfloat16 on
    cuda, else float32), float32 or bfloat16. Raises ConfigError where nothing loads.
    """
    device = resolve_device(device)
    dtype = choose_dtype(dtype, device)
    disable_progress_bar()
    source = find_policy(name)
    try:
        config = AutoConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: Any = model_class(config).from_pretrained(source, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"policy = {name!r}: no policy loads from there: {reason}") from error
    vision = Vision.load(source, config) if reads_pictures(config) else None
    if vision is None and hasattr(config, "vision_config"):
        of = f"pictures are shown to {', '.join(IN_ONE_LINE)} alone"
        logger.warning("policy %s: a %s model is told texts only: %s", name, config.model_type, of)
    return Policy(model.to(device).eval(), tokenizer, vision)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a policy alone."""
    return AutoTokenizer.from_pretrained(find_policy(name))


def model_class(config: PretrainedConfig) -> Any:
    """The auto class that loads a policy of this configuration: one that reads pictures, or text alone."""
    return AutoModelForImageTextToText if reads_pictures(config) else AutoModelForCausalLM
