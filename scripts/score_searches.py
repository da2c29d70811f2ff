"""`sleuth score-searches`: scores of the passages of an agent's searches that only a model can give."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from agent.evaluation.judge_config import JudgeConfig
from data.errors import ConfigError, EngineError, require, require_range
from data.machine.listening import why_silent
from data.text import counted
from scripts.agent_options import AgentOptions
from scripts.console import going_on, track

if TYPE_CHECKING:
    from rl.co_training.scores import Scorer
    from scripts.wiring import OpenedAgent

Name = Literal["fork", "alone", "likelihood", "judge", "read"]


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(AgentOptions):
    """Trajectories to score, and the judge."""

    trajectories: Path
    """Trajectories of `sleuth evaluate` or of a training."""
    out: str
    """File for the scores."""
    by: list[Name] = field(default_factory=lambda: ["fork"])
    """fork: exact match of continuations with a passage, less that with the next one in its place. alone: of
    a greedy one with it alone. likelihood: of the gold answer, as fork, nothing sampled. judge: a language
    model's grade, 0-100. read: its verdict on the words that follow an opened page, 0 or 100."""
    continuations: int = 4
    """fork: continuations of each."""
    temperature: float = 1.0
    """fork: of sampling; 0 for one greedy continuation."""
    pool: int = 20
    """Candidates of a query: what it showed and further hits. fork and likelihood try the first 5 and 2
    drawn of the rest."""
    all_groups: bool = False
    """Also searches of questions that all samples answer, or none; left out with fork, where they differ
    least."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """Language model of judge and read: url, model, api_key_file and limits."""
    max_rows: int = 128
    """Trajectories decoded at once."""
    seed: int = 0

    def __post_init__(self) -> None:
        require(bool(self.by), "by", self.by, "fork, alone, likelihood, judge or read")
        require_range(self, "", ">= 1", "continuations", "pool")
        greedy = self.temperature > 0 or self.continuations == 1
        require(greedy, "continuations", self.continuations, "1 with temperature 0")


def main(config: ScoreConfig) -> None:
    """Score the passages of searches, for the labels of `sleuth mine --trajectories --scores`.

    Killed, the same command goes on. Prints what each scorer cost for a thousand searches.
    """
    from rl.co_training.judges import open_judge
    from rl.co_training.searches import read_searches
    from scripts.wiring import open_asked

    next(read_searches(config.trajectories), None)  # what is no trajectory is said before a model loads
    asks = {"judge", "read"} & set(config.by)
    judge = open_judge(config.judge, Path(f"{config.out}.judge.jsonl")) if asks else None
    if judge and (reason := why_silent(str(config.judge.url))):
        raise EngineError(f"judge.url = {config.judge.url!r}: nobody listens ({reason})")
    needs_model = "likelihood" in config.by and not config.engine.shares_model
    if needs_model and config.device == "cpu":
        raise ConfigError("by: likelihood reads the policy's weights here; leave out --device cpu")
    opened = open_asked(config, config.max_rows, Path(config.out).parent)
    with going_on(config.out):
        costs = asyncio.run(_score(opened, judge, config))
    count = costs["searches"]
    print(f"{counted(count, 'search')} scored in {config.out}")
    if not count and "fork" in config.by and not config.all_groups:
        print("no question has samples that are right and others that are wrong: --all_groups takes all")
    for name in config.by if count else ():
        tokens, seconds = (1000 * costs[f"{name} {unit}"] / count for unit in ("tokens", "seconds"))
        print(f"{name}: {tokens:,.0f} tokens and {seconds:,.0f} seconds a thousand searches")


async def _score(opened: OpenedAgent, judge: Any, config: ScoreConfig) -> Any:
    from rl.co_training.forks import Forks
    from rl.co_training.scores import score_file

    async with opened:
        await opened.check()
        forks = Forks(opened.agent, opened.policy.model, config.continuations, seed=config.seed)
        scorers: dict[str, Scorer] = {
            name: getattr(judge if name in ("judge", "read") else forks, name) for name in config.by
        }
        return await score_file(
            config.trajectories, config.out, scorers, opened.client, config.pool,
            opened.agent.protocol.query_style, "fork" in config.by and not config.all_groups,
            track("scoring searches"),
        )  # fmt: skip
