"""Settings that the training of a policy and that of a retriever have alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data.errors import require


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), merged into the model that is saved."""

    rank: int = 0
    """Of the adapters; 0 trains all weights."""
    alpha: float = 32.0
    """The adapters' output is scaled by alpha / rank."""
    dropout: float = 0.0
    """On the adapters' input while training."""
    target_modules: str = "all-linear"
    """Layers that get an adapter: all-linear, or names separated by commas, such as q_proj,v_proj."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, "lora.rank", self.rank, ">= 0")
        require(self.alpha > 0, "lora.alpha", self.alpha, "> 0")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "in [0, 1)")


@dataclass(frozen=True)
class WandbConfig:
    """Tracking with Weights & Biases, off unless a project is named."""

    project: str | None = None
    """Project to log to; none: no tracking."""
    mode: Literal["online", "offline"] = "online"
    """offline keeps the run on this disk."""


@dataclass(frozen=True)
class EngineConfig:
    """What samples: this process, or vLLM servers (docs/scaling.md)."""

    name: Literal["hf", "vllm"] = "hf"
    """hf: transformers, in this process; vllm: servers, started here or joined."""
    urls: str | None = None
    """Of vLLM servers that run already, separated by commas; none: they are started."""
    servers: int = 1
    """How many to start, each on CUDA devices of its own where there are enough."""
    python: str = ".venv-vllm/bin/python"
    """Of the environment that vLLM lives in: scripts/vllm_env.sh makes it."""
    arguments: str = ""
    """More of what a started server is told, such as --max-model-len 4096 --gpu-memory-utilization 0.5."""
    devices: str | None = None
    """CUDA devices of the started servers, such as 1,2,3; none: all that are visible."""
    sync_folder: str | None = None
    """Where weights are handed over; all servers must see it. None: a folder of this machine's own."""
    transport: Literal["folder", "nccl", "ipc"] = "folder"
    """How new weights reach servers: by files; from GPU to GPU; within one GPU that is shared with them."""
    lora: Literal["merged", "adapter"] = "merged"
    """What servers get of LoRA: whole weights, adapters merged; or the adapters alone, by files."""
    max_restarts: int = 3
    """Of each server that was started here, where it dies or hangs; those that are joined are not ours."""
    deadline_seconds: float = 600.0
    """The longest wait for a completion, for new weights to be loaded, or for servers to start."""
    max_probe_difference: float | None = None
    """Mean difference of a probe's log-probs from the trainer's that stops the run, in nats; none: 0.001
    in float32, else 0.05."""

    def __post_init__(self) -> None:
        require(self.servers >= 1, "engine.servers", self.servers, ">= 1")
        require(self.deadline_seconds > 0, "engine.deadline_seconds", self.deadline_seconds, "> 0")
        require(self.max_restarts >= 0, "engine.max_restarts", self.max_restarts, ">= 0")
        by_files = self.lora == "merged" or self.transport == "folder"
        require(by_files, "engine.transport", self.transport, "folder with engine.lora adapter")
        limit = self.max_probe_difference
        require(limit is None or limit > 0, "engine.max_probe_difference", limit, "> 0")
        require(self.name == "vllm" or self.urls is None, "engine.urls", self.urls, "none for engine hf")
