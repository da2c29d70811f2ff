"""What a training run is told: plain frozen dataclasses, whose field docstrings are the help.

Nothing heavy is imported here, so that a wrong key is refused before any model loads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from data.errors import ConfigError


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{name} = {value!r}: must be {allowed}")


@dataclass(frozen=True)
class RolloutConfig:
    """How trajectories are sampled."""

    questions_per_step: int = 16
    """Questions drawn for one step; each is answered `group_size` times."""
    group_size: int = 8
    """Trajectories of one question; their mean reward is the baseline."""
    temperature: float = 1.0
    """Of sampling; the trainer's log-probs are taken at the same temperature."""
    max_rows: int = 128
    """Trajectories that the engine decodes at once."""
    max_failed_share: float = 0.1
    """Of a batch whose searches may fail before the run stops with its state saved."""
    retriever_deadline_seconds: float = 60.0
    """How long a search is retried before it counts as failed."""

    def __post_init__(self) -> None:
        _require(self.questions_per_step >= 1, "rollout.questions_per_step", self.questions_per_step, ">= 1")
        _require(self.group_size >= 2, "rollout.group_size", self.group_size, ">= 2")
        _require(self.temperature > 0, "rollout.temperature", self.temperature, "> 0")
        _require(self.max_rows >= 1, "rollout.max_rows", self.max_rows, ">= 1")
        _require(
            0 <= self.max_failed_share <= 1, "rollout.max_failed_share", self.max_failed_share, "in [0, 1]"
        )
        deadline = self.retriever_deadline_seconds
        _require(deadline > 0, "rollout.retriever_deadline_seconds", deadline, "> 0")


@dataclass(frozen=True)
class AlgorithmConfig:
    """GRPO (Shao et al. 2024, arXiv 2402.03300) with the token average of DAPO (arXiv 2503.14476)."""

    learning_rate: float = 1e-6
    """Of AdamW, after `warmup_steps`."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm."""
    updates_per_rollout: int = 1
    """Optimiser updates a batch of trajectories; 1 is on-policy."""
    scale_by_spread: bool = True
    """Divide advantages by the group's standard deviation (False: Dr. GRPO, arXiv 2503.20783)."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    kl_coefficient: float = 0.0
    """Weight of the k3 estimate of the KL divergence from the starting policy; 0 loads no reference."""

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, "algorithm.learning_rate", self.learning_rate, "> 0")
        _require(self.warmup_steps >= 0, "algorithm.warmup_steps", self.warmup_steps, ">= 0")
        _require(self.weight_decay >= 0, "algorithm.weight_decay", self.weight_decay, ">= 0")
        _require(self.max_grad_norm > 0, "algorithm.max_grad_norm", self.max_grad_norm, "> 0")
        _require(
            self.updates_per_rollout >= 1, "algorithm.updates_per_rollout", self.updates_per_rollout, ">= 1"
        )
        _require(0 < self.clip_low < 1, "algorithm.clip_low", self.clip_low, "in (0, 1)")
        _require(self.clip_high > 0, "algorithm.clip_high", self.clip_high, "> 0")
        _require(self.kl_coefficient >= 0, "algorithm.kl_coefficient", self.kl_coefficient, ">= 0")


@dataclass(frozen=True)
class ProtocolConfig:
    """Which protocol the policy speaks, and where its limits differ from the protocol's own."""

    name: str | None = None
    """search_r1, compact or hermes (docs/protocol.md); none: the policy folder's own, else search_r1."""
    max_turns: int | None = None
    """Searches a trajectory may make."""
    top_k: int | None = None
    """Passages shown a search."""
    max_response_tokens: int | None = None
    """Of one turn."""
    max_observation_tokens: int | None = None
    """Of one observation."""
    max_context_tokens: int | None = None
    """Of a trajectory before its last turn."""


@dataclass(frozen=True)
class WandbConfig:
    """Tracking with Weights & Biases, off unless a project is named."""

    project: str | None = None
    """Project to log to; none: no tracking."""
    mode: Literal["online", "offline"] = "online"
    """offline keeps the run on this disk."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a policy to search by GRPO on the rewards of its own answers."""

    policy: str
    """The starting policy: a folder, a hub name, or one that comes with Sleuth: atlas, smollm2."""
    questions: str
    """Training questions: JSONL, parquet, or a hub name; several separated by commas."""
    retriever: str
    """URL of a retriever server, or an index folder to search in process."""
    out: str
    """The run folder. A run found there with the same configuration is resumed."""
    resume: bool = False
    """Resume the run in `out` even though the configuration has changed, such as more steps."""
    split: str | None = None
    """Of the training questions, where their source has several."""
    dev_questions: str | None = None
    """Questions for `eval_every` and the choice of the best checkpoint."""
    dev_split: str | None = None
    """Of the dev questions."""
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rewards: dict[str, float] = field(default_factory=lambda: {"em": 1.0})
    """Weights of the rewards that are summed: em, format."""
    steps: int = 100
    """Steps in all: a rollout of questions_per_step x group_size trajectories and its updates."""
    eval_every: int = 0
    """Steps between evaluations on the dev questions; 0: none, and the last checkpoint is the best."""
    eval_limit: int | None = None
    """Only the first so many dev questions."""
    save_every: int = 50
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """Checkpoints kept beside the best."""
    micro_batch_tokens: int = 16384
    """Padded tokens of one forward and backward pass."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    dtype: str = "auto"
    """Of the weights: float32, bfloat16, or auto: bfloat16 on cuda, else float32."""
    deterministic: bool = False
    """One thread and deterministic kernels: the same run, bit for bit (retriever in process)."""
    mask_observations: bool = True
    """False trains on what the retriever wrote, too: only to show what that does."""
    seed: int = 0
    """Of the order of questions and of every trajectory's generator."""
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        _require(self.steps >= 1, "steps", self.steps, ">= 1")
        _require(self.eval_every >= 0, "eval_every", self.eval_every, ">= 0")
        _require(self.eval_limit is None or self.eval_limit >= 1, "eval_limit", self.eval_limit, ">= 1")
        _require(self.save_every >= 1, "save_every", self.save_every, ">= 1")
        _require(self.keep_checkpoints >= 1, "keep_checkpoints", self.keep_checkpoints, ">= 1")
        _require(self.micro_batch_tokens >= 1, "micro_batch_tokens", self.micro_batch_tokens, ">= 1")
        _require(
            self.device == "auto" or self.device.split(":")[0] in ("cpu", "cuda"),
            "device",
            self.device,
            "auto, cpu or cuda",
        )
        _require(
            self.dtype in ("auto", "float32", "bfloat16"), "dtype", self.dtype, "auto, float32 or bfloat16"
        )
        _require(bool(self.rewards), "rewards", self.rewards, "at least one reward with its weight")
        _require(
            not self.eval_every or self.dev_questions is not None,
            "eval_every",
            self.eval_every,
            "0 without dev_questions",
        )


@dataclass(frozen=True)
class WarmStartConfig:
    """Supervised fine-tuning on demonstrations."""

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 16
    """Demonstrations a step."""
    learning_rate: float = 2e-3
    """Its peak, after a warm-up over a twentieth of the steps; it falls to a tenth by a cosine."""
    weight_decay: float = 0.01
    """Of both optimisers: Muon for the matrices inside the layers, AdamW for the rest."""
    learn_everything: bool = False
    """Put the prompt and the passages into the loss, too."""
    group_by_length: bool = False
    """Demonstrations of like length in a batch: faster, but those that are short then count for more."""
    seed: int = 0
    """Of the order of the demonstrations."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate"):
            _require(getattr(self, name) > 0, f"training.{name}", getattr(self, name), "> 0")
