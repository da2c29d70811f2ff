"""Options of commands that let a policy search: how it runs, which questions it is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from agent.engines.config import EngineConfig
from rl.config import ProtocolConfig

if TYPE_CHECKING:
    from scripts.wiring import OpenedAgent


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
    """Folder, hub name, or one that comes with Sleuth (atlas, smollm2)."""
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

    def open(self, max_rows: int, folder: Path | None = None) -> OpenedAgent:
        """Open the agent: `scripts.wiring.open_agent`."""
        from scripts.wiring import open_agent

        place = (self.device, self.dtype, self.deadline_seconds)
        asked = (self.policy, self.retriever, self.protocol, self.temperature, max_rows)
        return open_agent(*asked, *place, engine=self.engine, folder=folder)
