"""Configuration of the engine: which one samples, and how it gets weights; nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from data.errors import require, require_range
from data.objects.plugins import find_plugin


@dataclass(frozen=True)
class EngineConfig:
    """The sampler: this process, vLLM servers (docs/scaling.md), or a class of your own."""

    name: Literal["hf", "vllm"] = "hf"
    """hf: transformers, in this process; vllm: servers, started here or joined."""
    class_path: str | None = None
    """An engine of your own, module.Class (docs/agent.md); it takes the place of `name`."""
    init_args: dict[str, Any] | None = None
    """Arguments of that class."""
    urls: str | None = None
    """Addresses of vLLM servers that run already, separated by commas; none: they are started."""
    servers: int = 1
    """Servers to start, each on CUDA devices of its own where there are enough."""
    python: str = ".venv-vllm/bin/python"
    """Python of the environment that vLLM lives in: scripts/vllm_env.sh makes it."""
    arguments: str = ""
    """More of what a started server is told, such as --max-model-len 4096 --gpu-memory-utilization 0.5."""
    devices: str | None = None
    """CUDA devices of the started servers, such as 1,2,3; none: all that are visible."""
    sync_folder: str | None = None
    """Folder in which weights are handed over; all servers must see it. None: one of this machine's own."""
    transport: Literal["folder", "nccl", "ipc"] = "folder"
    """Way of new weights to the servers: by files; from GPU to GPU; within one GPU that they share."""
    lora: Literal["merged", "adapter"] = "merged"
    """The part of LoRA that servers get: whole weights, adapters merged; or the adapters alone, by files."""
    max_restarts: int = 3
    """Restarts in a row of a server that was started here, where it dies or hangs; never of joined ones."""
    deadline_seconds: float = 600.0
    """The longest wait for a completion, for new weights to be loaded, or for servers to start."""
    max_probe_difference: float | None = None
    """Mean difference of a probe's log-probs from the trainer's that stops the run, in nats; none: 0.001
    in float32, else 0.05."""

    def __post_init__(self) -> None:
        require_range(self, "engine.", ">= 1", "servers")
        require_range(self, "engine.", "> 0", "deadline_seconds")
        require_range(self, "engine.", ">= 0", "max_restarts")
        by_files = self.lora == "merged" or self.transport == "folder"
        require(by_files, "engine.transport", self.transport, "folder with engine.lora adapter")
        limit = self.max_probe_difference
        require(limit is None or limit > 0, "engine.max_probe_difference", limit, "> 0")
        require(self.name == "vllm" or self.urls is None, "engine.urls", self.urls, "none for engine hf")
        alone = self.class_path is None or (self.name == "hf" and self.urls is None)
        require(alone, "engine.class_path", self.class_path, "given without engine.name and engine.urls")
        taken = self.class_path is not None or self.init_args is None
        require(taken, "engine.init_args", self.init_args, "none without engine.class_path")

    @property
    def label(self) -> str:
        """The name of the engine in messages and settings."""
        return self.class_path or self.name

    @property
    def shares_model(self) -> bool:
        """`Engine.shares_model` of the engine that this describes; nothing is opened."""
        if self.class_path is not None:
            return bool(getattr(find_plugin(self.class_path, "engine.class_path"), "shares_model", False))
        return self.name == "hf"

    @property
    def servers_to_start(self) -> int:
        """The number of servers that are started for it."""
        return self.servers if self.name == "vllm" and self.urls is None else 0
