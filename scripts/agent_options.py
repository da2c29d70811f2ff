"""Options of commands that let a policy search: how it runs, which questions it is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from agent.engines.config import EngineConfig
from data.errors import require_range
from rl.config import ProtocolConfig


@dataclass(frozen=True, kw_only=True)
class QuestionOptions:
    """Questions, and how their answers are sampled."""

    questions: str
    """JSONL, parquet, folder or hub name; several separated by commas."""
    split: str | None = None
    """Split of the questions, where there are several."""
    limit: int | None = None
    """Only the first so many questions."""
    normalizer: Literal["squad", "unicode", "unicode_folded"] | None = None
    """Normal form of answers: squad, or unicode for scripts without spaces; none: as each question's
    metadata say, else squad."""
    samples: int = 1
    """Answers of each question; more need a temperature. Scores are then means over them, with pass@k."""
    seed: int = 0
    """Seed of sampling."""
    max_rows: int = 128
    """Trajectories decoded at once."""


@dataclass(frozen=True, kw_only=True)
class AgentOptions:
    """A policy that searches, and where it runs."""

    policy: str
    """Folder, hub name, or one that comes with Sleuth (atlas, atlas-compares, smollm2)."""
    retriever: str
    """URL of a server, folder of an index or .yaml file; as controls, none (every search finds nothing) or
    random:INDEX (passages drawn at random)."""
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    """Protocol of the policy, and its limits."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Engine that samples: this process, or vLLM servers."""
    temperature: float = 0.0
    """Temperature of sampling; 0 is greedy."""
    deadline_seconds: float = 60.0
    """Seconds for which a search is retried before it counts as failed."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    dtype: str = "auto"
    """float32, bfloat16, or auto: bfloat16 on cuda, else float32."""


@dataclass(frozen=True, kw_only=True)
class AgentLimits:
    """The most that one request, and all of them together, may ask for."""

    concurrency: int = 16
    """Questions worked on at once; they share the engine."""
    max_waiting: int = 64
    """Questions that may wait for a place; beyond it 429."""
    max_tokens: int = 4096
    """The most tokens that the policy writes for one question; a client may ask for fewer."""
    max_question_chars: int = 8192
    """The longest question."""
    max_deadline_seconds: int = 300
    """The longest that a question may take; then it gets 504."""

    def __post_init__(self) -> None:
        at_least_one = ("concurrency", "max_tokens", "max_question_chars", "max_deadline_seconds")
        require_range(self, "", ">= 1", *at_least_one)
        require_range(self, "", ">= 0", "max_waiting")
