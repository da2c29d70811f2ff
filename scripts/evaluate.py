"""`sleuth evaluate`: score a policy's answers to a question set, and keep all its trajectories."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from agent.engines.config import EngineConfig
from data.errors import require
from data.records import Question
from rl.config import ProtocolConfig

if TYPE_CHECKING:
    from scripts.wiring import OpenedAgent


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a policy on a question set; writes scores.json and trajectories.jsonl."""

    policy: str
    """Folder, hub name, or one that comes with Sleuth (atlas, smollm2)."""
    questions: str
    """JSONL, parquet, folder or hub name; several separated by commas."""
    retriever: str
    """URL of a server, folder of an index or .yaml file; as controls, none (every search finds nothing) or
    random:INDEX (passages drawn at random)."""
    out: str
    """Folder for the evaluation."""
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    split: str | None = None
    """Split of the questions, where there are several."""
    limit: int | None = None
    """Only the first so many questions."""
    normalizer: Literal["squad", "unicode", "unicode_folded"] | None = None
    """How answers are compared: squad, or unicode for scripts without spaces; none: as each question's
    metadata say, else squad."""
    temperature: float = 0.0
    """Temperature of sampling; 0 is greedy."""
    seed: int = 0
    """Seed of sampling."""
    max_rows: int = 128
    """Trajectories decoded at once."""
    deadline_seconds: float = 60.0
    """How long a search is retried before it counts as failed."""
    max_failed_share: float = 0.1
    """Share of the questions whose searches may fail before the evaluation stops."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    dtype: str = "auto"
    """float32, bfloat16, or auto: bfloat16 on cuda, else float32."""

    def __post_init__(self) -> None:
        require(0 <= self.max_failed_share <= 1, "max_failed_share", self.max_failed_share, "in [0, 1]")


def main(config: EvaluateConfig) -> None:
    """Score a policy on a question set; writes scores.json and trajectories.jsonl.

    The same command again goes on where it stopped, and asks failed searches again.
    """
    from agent.evaluation.evaluate import check_folder
    from data.questions import load_questions
    from retriever_server.open_retriever import check_retriever
    from scripts.wiring import check_agent, open_agent

    policy, retriever, out = config.policy, config.retriever, config.out
    check_folder(out)
    check_agent(policy, config.protocol, config.device, config.engine)
    check_retriever(retriever, config.deadline_seconds)
    questions = load_questions(config.questions, config.split, config.limit, config.normalizer)
    opened = open_agent(
        policy,
        retriever,
        config.protocol,
        config.temperature,
        config.max_rows,
        config.device,
        config.dtype,
        config.deadline_seconds,
        engine=config.engine,
        folder=Path(out),
    )
    try:
        scores = asyncio.run(_evaluate(opened, questions, config))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; go on with the same command: {out} keeps the rest") from None
    show_scores(scores, f"{policy} with {retriever}")
    if obstacle := _obstacle(scores, policy, opened.agent.protocol.name, out):
        print(obstacle)
    if scores["search_failed"]:
        print(f"{scores['search_failed']} searches failed: the same command asks them again")


def _obstacle(scores: dict[str, Any], policy: str, protocol: str, out: str) -> str | None:
    """Why no answer could count, where none is in the form of the protocol."""
    from rl.diagnosis import no_valid_format

    if scores["valid_format_rate"] > 0:
        return None
    stops = {f"stop/{reason}": count / scores["n"] for reason, count in scores["stop_reasons"].items()}
    row = {
        "rollout/searches": scores["searches_per_question"],
        "rollout/invalid_actions": scores["invalid_actions_per_question"],
    }
    return str(no_valid_format([row | stops], policy, protocol, out))


async def _evaluate(
    opened: OpenedAgent, questions: Sequence[Question], config: EvaluateConfig
) -> dict[str, Any]:
    from agent.evaluation.evaluate import evaluate
    from scripts.wiring import retriever_generation

    settings = {"policy": config.policy, "seed": config.seed, **opened.settings()}
    async with opened:
        await opened.check()
        settings["retriever"] = await retriever_generation(opened.client, questions[0].text, config.retriever)
        rollout = rollout_with_bar(opened, config.seed, len(questions), Path(config.out))
        return await evaluate(questions, rollout, config.out, settings, config.max_failed_share)


def rollout_with_bar(opened: OpenedAgent, seed: int, total: int, folder: Path):
    """The rollout function of the evaluation in `folder`, with a bar."""
    from agent.evaluation.evaluate import roll_out_each
    from agent.prompt import frozen_frame
    from scripts.console import bar

    async def rollout(todo, on_finished):
        frame = frozen_frame(folder, opened.agent.protocol, opened.agent.tokenizer)
        agent = replace(opened.agent, prompt_frame=frame)
        done = count(total - len(todo) + 1)
        with bar("answering questions", total, total - len(todo)) as move:

            def finished(trajectory):
                on_finished(trajectory)
                move(next(done))

            await roll_out_each(agent, todo, seed, finished)

    return rollout


def show_scores(scores: dict[str, Any], title: str) -> None:
    """Print scores as a table: over all questions, then by kind."""
    from data.significance import format_estimate
    from scripts.console import show_table

    columns = ("questions", "n", "EM [95 %]", "F1", "cover EM", "searches", "valid format")
    kinds = scores["by_kind"].items() if len(scores["by_kind"]) > 1 else ()
    rows = [
        (
            name,
            row["n"],
            format_estimate(row["em"]),
            *(f"{row[metric]['mean']:.3f}" for metric in ("f1", "cover_em")),
            f"{row['searches_per_question']:.2f}",
            f"{row['valid_format_rate']:.3f}",
        )
        for name, row in [("all", scores), *kinds]
    ]
    show_table(title, columns, rows)
