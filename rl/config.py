"""The configuration of a training run: plain frozen dataclasses, whose field docstrings are the help.

Nothing heavy is imported here, so that a wrong key is refused before any model loads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from agent.engines.config import EngineConfig
from agent.evaluation.judge_config import JudgeConfig
from agent.mcp_tools import read_config
from agent.protocol import get_protocol
from data.errors import require, require_range
from data.settings import LoraConfig, WandbConfig
from rl.algorithm.presets import AlgorithmConfig


@dataclass(frozen=True)
class RolloutConfig:
    """Settings of the sampling of trajectories."""

    questions_per_step: int = 16
    """Questions drawn for one step; each is answered `group_size` times."""
    group_size: int = 8
    """Trajectories of one question; their mean reward is the baseline."""
    kind_weights: dict[str, float] = field(default_factory=dict)
    """Weights of the kinds of questions in the draw, by `kind` in their metadata, such as {two_hop: 1,
    comparison: 3}; kinds not named are left out. {}: all questions alike."""
    last_kind_weights: dict[str, float] = field(default_factory=dict)
    """Weights that `kind_weights` turn into, a little with each question, by the last step; {}: they stay."""
    temperature: float = 1.0
    """Softmax temperature of sampling; the trainer's log-probs are taken at the same temperature."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that hold this mass; below 1 only with `renormalise_logprobs`."""
    top_k: int = 0
    """Sample from so many of the likeliest tokens, 0: all; else only with `renormalise_logprobs`."""
    renormalise_logprobs: bool = False
    """Take the trainer's log-probs under the truncated distribution that top_p and top_k leave."""
    max_rows: int = 128
    """Trajectories that the engine decodes at once."""
    max_failed_share: float = 0.1
    """Share of a batch whose searches may fail before the run stops with its state saved."""
    retriever_deadline_seconds: float = 60.0
    """Seconds for which a search is retried before it counts as failed."""
    max_staleness: int = 0
    """Updates by which the oldest weights that wrote in a trajectory may lag behind those it trains. 0:
    rollouts and updates take turns; above, rollouts go on during updates (needs algorithm.importance)."""
    mixed_generations: bool = False
    """Let several generations of the retriever answer the searches of a group, and log the share of such
    groups. Else one that meets a swap is begun anew, and left out if it meets others."""
    deadline_seconds: float = 3600.0
    """Seconds that an update waits for its trajectories before the run stops with its state saved."""

    def __post_init__(self) -> None:
        require_range(self, "rollout.", ">= 1", "questions_per_step", "group_size", "max_rows")
        require_range(self, "rollout.", ">= 0", "top_k", "max_staleness")
        require_range(
            self, "rollout.", "> 0", "temperature", "retriever_deadline_seconds", "deadline_seconds"
        )
        require_range(self, "rollout.", "in [0, 1]", "max_failed_share")
        for name in ("kind_weights", "last_kind_weights"):
            weights = getattr(self, name)
            fits = not weights or (min(weights.values()) >= 0 and max(weights.values()) > 0)
            require(fits, f"rollout.{name}", weights, "numbers >= 0, one of them above")
        begun = not self.last_kind_weights or bool(self.kind_weights)
        require(begun, "rollout.last_kind_weights", self.last_kind_weights, "{} without kind_weights")
        require(0 < self.top_p <= 1, "rollout.top_p", self.top_p, "in (0, 1]")
        for name, full in (("top_p", 1), ("top_k", 0)):
            # The tokens sampled would not be those that the log-probs of the loss speak of.
            kept = self.renormalise_logprobs or getattr(self, name) == full
            require(kept, f"rollout.{name}", getattr(self, name), f"{full}, or renormalise_logprobs true")

    @property
    def batches_in_flight(self) -> int:
        """Batches of `questions_per_step` that may be begun and not yet trained on.

        As many as the staleness allows if no trajectory is ever late; from 2 on one fewer, so that what
        straggles may be trained on a step later.
        """
        return min(self.max_staleness + 1, max(2, self.max_staleness))


@dataclass(frozen=True)
class ProtocolConfig:
    """The protocol that the policy speaks, and limits that differ from the protocol's own."""

    name: str | None = None
    """search_r1, compact or hermes (docs/protocol.md); none: the policy folder's own, else search_r1."""
    titles: Literal["quoted", "unquoted"] | None = None
    """quoted: as they stand in a passage's `contents`, which is Search-R1's text; unquoted: search_r1 as the
    first version of Sleuth wrote it (docs/protocol.md). None: the protocol's own."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Arguments of the policy's chat template besides the messages, such as {enable_thinking: false}."""
    tools: list[Any] | None = None
    """Tools that the policy may call: [search, open_page, {mcp: URL or command}] (docs/agent.md). None: as
    its folder says."""
    answer_form: Literal["short", "confidence", "cited"] | None = None
    """Parts of an answer: with confidence also how sure the policy is; cited: explanation, citations, exact
    answer and confidence, as BrowseComp-Plus wants them. None: as its folder says."""
    may_abstain: bool | None = None
    """Tell the policy that it may answer "I don't know". None: as its folder says."""
    max_turns: int | None = None
    """Searches a trajectory may make."""
    top_k: int | None = None
    """Passages shown a search."""
    query_style: Literal["query", "question", "history"] | None = None
    """Text that the retriever is asked: the policy's query alone, after its question, or with the question
    and the earlier queries. None: as the retriever was trained; another one is refused."""
    max_response_tokens: int | None = None
    """Tokens of one turn."""
    max_observation_tokens: int | None = None
    """Tokens of one observation."""
    max_context_tokens: int | None = None
    """Tokens of a trajectory before its last turn."""

    def __post_init__(self) -> None:
        if self.name is not None or self.tools is not None:
            own = [tool for tool in self.tools or ["search"] if isinstance(tool, str)]
            get_protocol(self.name or "search_r1", tools=own)
        for tool in self.tools or ():
            allowed = "a name, or {mcp: URL or command}"
            require(isinstance(tool, str | dict), "protocol.tools", tool, allowed)
            if isinstance(tool, dict):
                read_config(tool)


@dataclass(frozen=True)
class SentinelConfig:
    """The bounds of a collapse, against the run's own first steps, and what is then done."""

    action: Literal["warn", "stop", "roll_back", "preserve"] = "warn"
    """After `patience` alarms in a row: only warn, stop with the state saved, go back to the best checkpoint,
    or from then on preserve the likelihood of what was not bad (algorithm.llds_coefficient)."""
    preserve_coefficient: float = 0.1
    """The coefficient that action preserve sets."""
    patience: int = 3
    """Steps in a row with an alarm before `action`."""
    baseline_steps: int = 10
    """First steps whose medians the later ones are compared with."""
    min_entropy_share: float = 0.1
    """Alarm where the entropy falls below this share of its baseline."""
    max_entropy_share: float = 5.0
    """Alarm where the entropy rises above this multiple of its baseline."""
    min_valid_share: float = 0.5
    """Alarm where the share of valid trajectories falls below this share of its baseline."""
    max_correct_logprob_fall: float = 1.0
    """Alarm where the mean log-prob of correct trajectories' tokens falls by more, in nats (likelihood
    displacement, arXiv 2512.04220)."""
    max_grad_norm_ratio: float = 20.0
    """Alarm where the gradient norm rises above this multiple of its baseline."""
    max_sampler_difference: float = 0.1
    """Alarm where sampler and trainer differ by more on average, in nats a token."""
    max_roll_backs: int = 3
    """Roll-backs before the run stops."""

    def __post_init__(self) -> None:
        require_range(self, "sentinel.", ">= 1", "patience", "baseline_steps", "max_roll_backs")
        require_range(self, "sentinel.", "> 0", "preserve_coefficient")


@dataclass(frozen=True)
class RayConfig:
    """Placement of the processes of a run by Ray, which watches over them (docs/scaling.md)."""

    address: str | None = None
    """local, auto or HOST:PORT of a cluster's head; `--ray ADDRESS` for short. None: without Ray."""
    trainers: int = 1
    """Trainer processes."""
    retrievers: int = 0
    """Replicas that serve `retriever` to all trainers; 0: each trainer asks `retriever` itself."""
    cpus: float = 1.0
    """CPUs set aside for each process."""
    trainer_gpus: float = 1.0
    """GPUs of each trainer, where the cluster has any and `device` is not cpu."""
    engine_gpus: float = 1.0
    """GPUs of each vLLM server, likewise."""
    spread: bool = False
    """Processes on as many machines as there are, rather than on as few."""
    max_restarts: int = 5
    """Restarts of the trainers without a new checkpoint, and of an engine or replica, in a row."""
    start_seconds: float = 900.0
    """The longest wait for room in the cluster, and for engines and replicas to answer."""
    quiet_seconds: float = 3600.0
    """Trainers that write nothing for so long hang, and are started again."""

    def __post_init__(self) -> None:
        require_range(self, "ray.", ">= 1", "trainers")
        require_range(self, "ray.", ">= 0", "retrievers", "trainer_gpus", "engine_gpus", "max_restarts")
        require_range(self, "ray.", "> 0", "cpus", "start_seconds", "quiet_seconds")


@dataclass(frozen=True)
class TrainConfig:
    """Train a policy to search on the rewards of its own answers."""

    policy: str
    """The starting policy: a folder, a hub name, or one of ours: atlas, atlas-compares, smollm2."""
    questions: str
    """Training questions: JSONL, parquet, or a hub name; several separated by commas."""
    retriever: str
    """URL of a retriever server, those of replicas separated by commas, or an index folder to search here."""
    out: str
    """The run folder. A run found there with the same configuration is resumed."""
    resume: bool = False
    """Resume the run in `out` even though the configuration has changed, such as more steps."""
    preset: str | None = None
    """Sets all algorithm fields but the recipe's, before the file or option that names it; what
    `algorithm` says in that file, or after it on the line, wins."""
    dry_run: bool = False
    """Only print what the run will need: memory by part, seconds a step, disk."""
    split: str | None = None
    """Split of the training questions, where their source has several."""
    dev_questions: str | None = None
    """Questions for `eval_every` and the choice of the best checkpoint."""
    dev_split: str | None = None
    """Split of the dev questions."""
    normalizer: Literal["squad", "unicode", "unicode_folded"] | None = None
    """Normal form of answers: squad, or unicode for scripts without spaces; none: as each question's
    metadata say, else squad."""
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rewards: dict[str, float] = field(default_factory=lambda: {"em": 1.0})
    """Weights of the rewards that are summed: em, f1, ... (docs/rl.md), or module.function of your own."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    sentinel: SentinelConfig = field(default_factory=SentinelConfig)
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
    keep_rollouts_every: int = 0
    """Steps between those whose trajectories stay on disk, in rollouts/step-NUMBER-PROCESS.jsonl; 0: none."""
    micro_batch_tokens: int = 16384
    """Tokens of one forward and backward pass."""
    packing: bool = True
    """Trajectories one after another in a row, none padded; false pads them to the longest."""
    sharding: Literal["none", "fsdp"] = "none"
    """With several processes: every one holds the whole model, or a share of it (FSDP2)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    dtype: str = "auto"
    """Type of the weights: float32, bfloat16, or auto: bfloat16 on cuda, else float32."""
    deterministic: bool = False
    """One thread and deterministic kernels: the same run, bit for bit (retriever in process)."""
    mask_observations: bool = True
    """False trains on what the retriever wrote, too: only to show what that does."""
    seed: int = 0
    """Seed of the order of questions and of every trajectory's generator."""
    ray: RayConfig = field(default_factory=RayConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        require_range(self, "", ">= 1", "steps", "save_every", "keep_checkpoints", "micro_batch_tokens")
        require_range(self, "", ">= 0", "eval_every", "keep_rollouts_every")
        require(self.eval_limit is None or self.eval_limit >= 1, "eval_limit", self.eval_limit, ">= 1")
        device, dtype = self.device.split(":")[0], self.dtype
        require(device in ("auto", "cpu", "cuda"), "device", self.device, "auto, cpu or cuda")
        require(dtype in ("auto", "float32", "bfloat16"), "dtype", dtype, "auto, float32 or bfloat16")
        require(bool(self.rewards), "rewards", self.rewards, "at least one reward with its weight")
        rollout, algorithm, action = self.rollout, self.algorithm, self.sentinel.action
        corrected = rollout.max_staleness == 0 or algorithm.importance != "none"
        allowed = "0 with algorithm.importance none: what older weights wrote needs the correction"
        require(corrected, "rollout.max_staleness", rollout.max_staleness, allowed)
        compared = rollout.group_size >= 2 or not algorithm.needs_groups
        allowed = f">= 2 for advantage {algorithm.advantage}"
        require(compared, "rollout.group_size", rollout.group_size, allowed)
        allowed = "another without eval_every: there would be no best checkpoint"
        require(action != "roll_back" or self.eval_every > 0, "sentinel.action", action, allowed)
        acts = algorithm.updates_per_rollout > 1
        allowed = "another with algorithm.updates_per_rollout 1: likelihood is lost between rollouts alone"
        require(action != "preserve" or acts, "sentinel.action", action, allowed)
        judged = not self.eval_every or self.dev_questions is not None
        require(judged, "eval_every", self.eval_every, "0 without dev_questions")
        adapted = self.engine.lora == "merged" or self.lora.rank > 0
        require(adapted, "engine.lora", self.engine.lora, "merged where lora.rank is 0")
        local = not self.deterministic or self.engine.shares_model
        allowed = f"false with engine {self.engine.label}, which batches as requests come"
        require(local, "deterministic", True, allowed)
        served = any(isinstance(tool, dict) for tool in self.protocol.tools or [])
        require(not (self.deterministic and served), "deterministic", True, "false with tools of MCP servers")


@dataclass(frozen=True)
class WarmStartConfig:
    """Supervised fine-tuning on demonstrations."""

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 16
    """Demonstrations a step."""
    learning_rate: float = 2e-3
    """Its peak, after a warm-up over a twentieth of the steps; it falls to a tenth by a cosine. For AdamW on
    a pretrained language model 1e-4 or so."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: for the matrices inside the layers, AdamW for the rest; adamw: for all, which is much faster a
    step from some ten million weights on."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: computes in it where that is safe (autocast); what is trained stays in float32."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters, merged at the end. With precision bfloat16 the other weights are held in it, too."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    weight_decay: float = 0.01
    """Weight decay of the optimisers."""
    learn_everything: bool = False
    """Put the prompt and the passages into the loss, too."""
    group_by_length: bool = False
    """Demonstrations of like length in a batch: faster, but those that are short then count for more."""
    save_every: int = 200
    """Steps between checkpoints, from which the same command goes on; they go when the policy is there."""
    seed: int = 0
    """Seed of the order of the demonstrations."""

    def __post_init__(self) -> None:
        require_range(self, "training.", "> 0", "steps", "batch_size", "learning_rate", "save_every")
