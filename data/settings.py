"""Settings that several commands share: LoRA, trackers, chat endpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data.errors import require


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), merged into the model that is saved."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights."""
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
    """Tracking with Weights & Biases or another tracker, off unless a project is named."""

    project: str | None = None
    """Project to log to; none: no tracking."""
    mode: Literal["online", "offline"] = "online"
    """offline keeps the run on this disk."""
    tracker: Literal["wandb", "trackio", "tensorboard"] | None = None
    """Logs to Trackio or TensorBoard (in the run's folder) instead; none: wandb."""


@dataclass(frozen=True)
class ChatConfig:
    """A language model behind any server that speaks OpenAI's chat completions."""

    url: str | None = None
    """Base URL, such as http://127.0.0.1:8001/v1."""
    model: str = ""
    """Name that the server knows it by."""
    api_key_file: str | None = None
    """File whose first line is the key; none: no key is sent."""
    timeout_seconds: float = 30.0
    """Seconds of one request; it is tried three times."""
    max_concurrent: int = 8
    """Requests at once."""
    max_calls: int = 100_000
    """Requests in all, those before a restart too; the run stops when they are spent."""
