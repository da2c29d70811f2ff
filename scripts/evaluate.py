"""`sleuth evaluate`: a policy's answers to a question set, scored, with all its trajectories."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from agent.engines.config import EngineConfig
from data.errors import ConfigError
from data.records import Question
from rl.config import ProtocolConfig

if TYPE_CHECKING:
    from scripts.wiring import OpenedAgent


def main(
    policy: str,
    questions: str,
    retriever: str,
    out: str,
    protocol: ProtocolConfig = ProtocolConfig(),  # noqa: B008 (frozen)
    engine: EngineConfig = EngineConfig(),  # noqa: B008 (frozen)
    split: str | None = None,
    limit: int | None = None,
    normalizer: Literal["squad", "unicode", "unicode_folded"] | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    max_rows: int = 128,
    deadline_seconds: float = 60.0,
    max_failed_share: float = 0.1,
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Score a policy on a question set; writes scores.json and trajectories.jsonl.

    The same command again goes on where it stopped, and asks failed searches again.

    Args:
        policy: Folder, hub name, or one that comes with Sleuth (atlas, smollm2).
        questions: JSONL, parquet, folder or hub name; several separated by commas.
        retriever: URL of a server, folder of an index or .yaml file; as controls, none (every search finds
            nothing) or random:INDEX (passages drawn at random).
        out: Folder for the evaluation.
        protocol: How the policy speaks, and its limits.
        engine: What samples: this process, or vLLM servers.
        split: Of the questions, where there are several.
        limit: Only the first so many questions.
        normalizer: How answers are compared: squad, or unicode for scripts without spaces; none: as each
            question's metadata say, else squad.
        temperature: Of sampling; 0 is greedy.
        seed: Of sampling.
        max_rows: Trajectories decoded at once.
        deadline_seconds: How long a search is retried before it counts as failed.
        max_failed_share: Of the questions whose searches may fail before the evaluation stops.
        device: cpu, cuda, or auto.
        dtype: float32, bfloat16, or auto: bfloat16 on cuda, else float32.
    """
    from agent.evaluate import check_folder
    from data.questions import load_questions
    from retriever_server.open_retriever import check_retriever
    from scripts.wiring import check_agent, open_agent

    if not 0 <= max_failed_share <= 1:
        raise ConfigError(f"max_failed_share = {max_failed_share}: must be in [0, 1]")
    check_folder(out)
    check_agent(policy, protocol, device, engine)
    check_retriever(retriever, deadline_seconds)
    asked = load_questions(questions, split, limit, normalizer)
    opened = open_agent(
        policy,
        retriever,
        protocol,
        temperature,
        max_rows,
        device,
        dtype,
        deadline_seconds,
        engine=engine,
        folder=Path(out),
    )
    settings = {"policy": policy, "seed": seed, **opened.settings()}
    try:
        scores = asyncio.run(_evaluate(opened, asked, retriever, out, settings, max_failed_share))
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
    opened: OpenedAgent,
    questions: Sequence[Question],
    retriever: str,
    out: str,
    settings: dict[str, Any],
    max_failed_share: float,
) -> dict[str, Any]:
    from agent.evaluate import evaluate
    from scripts.wiring import retriever_generation

    async with opened:
        await opened.check()
        generation = await retriever_generation(opened.client, questions[0].text, retriever)
        settings = settings | {"retriever": generation}
        rollout = rollout_with_bar(opened, settings["seed"], len(questions), Path(out))
        return await evaluate(questions, rollout, out, settings, max_failed_share)


def rollout_with_bar(opened: OpenedAgent, seed: int, total: int, folder: Path):
    """The rollout function of the evaluation in `folder`, with a bar."""
    from agent.evaluate import roll_out_each
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
