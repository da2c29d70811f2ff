"""A policy as vLLM can serve it: as it is, or as another architecture that computes the same.

vLLM's Qwen2 takes heads to be hidden_size / heads wide and its attention on a CPU knows a few widths only.
Where a policy's heads are others it is handed over as a Llama whose heads are padded with zeros. Rotary
position pairs dim i with i + d/2 at frequency theta^(-2i/d): so each half of a head keeps its place in the
half of the wider head, and theta^(D/d) gives it the same frequency. Queries grow by sqrt(D/d), since scores
are divided by sqrt(D).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

from data.errors import ConfigError, EngineError
from data.jsonl import write_json

if TYPE_CHECKING:
    from agent.policy import Policy

CPU_WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Widths of heads of vLLM 0.32's attention on a CPU."""
KEPT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
"""Names that the configurations of a Qwen2 and a Llama share."""


@dataclass(frozen=True)
class WeightExport:
    """A policy whose heads are `width` wide, exported with heads `served` wide; None: as it is."""

    policy: Policy
    width: int
    served: int | None = None

    def save(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Write safetensors and configuration as a server loads them; state: the weights, or the model's."""
        model = self.policy.model
        if self.served is None:
            model.save_pretrained(folder, state_dict=state)
            return
        with torch.device("meta"):  # names and configuration alone
            twin = LlamaForCausalLM(self._llama())
        twin.save_pretrained(folder, state_dict=self.weights(state or model.state_dict()))

    def save_policy(self, folder: Path) -> str:
        """The folder, with all that a server loads at its start."""
        self.save(folder)
        self.policy.tokenizer.save_pretrained(folder)
        return str(folder)

    def save_adapter(self, folder: Path, state: dict[str, Tensor] | None) -> None:
        """Write LoRA adapters as peft does; state: A and B by name, what scales their product put into B."""
        if not state:
            raise EngineError("engine.lora = 'adapter': the policy has no adapters to hand over")
        named = {f"base_model.model.{n.replace('.default.', '.')}": w for n, w in self.weights(state).items()}
        rank = next(len(tensor) for name, tensor in named.items() if ".lora_A." in name)
        targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in named})
        written = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: w.contiguous().cpu() for name, w in named.items()}, folder / "adapter_model.safetensors"
        )
        write_json(folder / "adapter_config.json", {**written, "bias": "none", "task_type": "CAUSAL_LM"})

    def weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights by name as the server has them; adapters' matrices too, which are padded alike."""
        served = {name: self._tensor(name, tensor) for name, tensor in state.items()}
        for name, tensor in state.items():  # a Llama with biases has one there, too
            layer, _, kind = name.rpartition(".o_proj.")
            if self.served and kind == "weight" and self._llama().attention_bias:
                served.setdefault(f"{layer}.o_proj.bias", tensor.new_zeros(len(tensor)))
        return served

    def _tensor(self, name: str, tensor: Tensor) -> Tensor:
        if self.served is None or ".self_attn." not in name:
            return tensor
        layer, kind = name.partition(".self_attn.")[2].split(".", 1)
        if layer == "o_proj":  # what it reads is padded: its columns, or those of its adapter's A
            reads = kind == "weight" or "lora_A" in kind
            return self._padded(tensor.T, parts=1).T.contiguous() if reads else tensor
        if "lora_A" in kind:
            return tensor
        if layer == "v_proj":
            return self._padded(tensor, parts=1)
        scale = (self.served / self.width) ** 0.5 if layer == "q_proj" else 1.0
        return self._padded(tensor, parts=2) * scale

    def _padded(self, tensor: Tensor, parts: int) -> Tensor:
        """(heads x width, ...) -> (heads x served, ...): zeros after each of so many parts of a head."""
        assert self.served is not None
        heads = tensor.unflatten(0, (-1, parts, self.width // parts))
        wide = heads.new_zeros(*heads.shape[:2], self.served // parts, *heads.shape[3:])
        wide[:, :, : heads.shape[2]] = heads
        return wide.flatten(0, 2)

    def _llama(self) -> LlamaConfig:
        config: Any = self.policy.model.config
        assert self.served is not None
        theta = config.rope_parameters["rope_theta"] ** (self.served / self.width)
        qwen = config.model_type == "qwen2"
        return LlamaConfig(
            **{name: getattr(config, name) for name in KEPT},
            head_dim=self.served,
            attention_bias=qwen or config.attention_bias,
            mlp_bias=not qwen and config.mlp_bias,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
            dtype=config.dtype,
        )


def export_for_vllm(policy: Policy, cpu: bool) -> WeightExport:
    """Return how to export the policy; cpu: to servers without a GPU.

    Raises ConfigError where vLLM would load it wrongly and it cannot be exported.
    """
    config: Any = policy.model.config.get_text_config()
    usual = config.hidden_size // config.num_attention_heads
    width = getattr(config, "head_dim", None) or usual
    misread = config.model_type == "qwen2" and width != usual
    if not misread and (not cpu or width in CPU_WIDTHS):
        return WeightExport(policy, width)
    wider = next((known for known in CPU_WIDTHS if known >= width), None)
    if wider is None or not _is_llama(config):
        if not misread:
            return WeightExport(policy, width)  # vLLM says itself what it does not take
        raise ConfigError(
            f"engine.name = 'vllm': vLLM takes a Qwen2's heads to be hidden_size / heads = {usual} wide, "
            f"this policy's are {width}, with a window or scaled positions; allowed: hf"
        )
    return WeightExport(policy, width, wider)


def _is_llama(config: PretrainedConfig) -> bool:
    """Return whether a Llama computes the same: plain rotary positions, no windows."""
    plain = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") == "default"
    full = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    return config.model_type in ("qwen2", "llama") and plain and full
