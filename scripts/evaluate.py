"""`sleuth evaluate`: score a policy's answers to a question set, and keep all its trajectories."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.evaluation.judge_config import JudgeConfig
from data.errors import EngineError, require, require_range
from data.jsonl import write_json
from data.machine.listening import why_silent
from data.machine.lock import locked
from data.questions import load_questions
from data.records import Question
from data.text import counted
from scripts.agent_options import AgentOptions, QuestionOptions
from scripts.console import bar, going_on, show_table

if TYPE_CHECKING:
    from agent.evaluation.judge import Judge
    from agent.rollout import Agent
    from scripts.wiring import OpenedAgent


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(QuestionOptions, AgentOptions):
    """Score a policy on a question set; writes scores.json and trajectories.jsonl."""

    out: str
    """Folder for the evaluation."""
    per_set: int | None = None
    """Only so many questions of each set, always the same ones; 512 is usual."""
    controls: bool | str | None = None
    """Alone or true: also closed_book, random, oracle and single_search, the leak of answers and the overlap
    with train_questions; pairs: evidence present, replaced, removed; all; or names (docs/evaluation.md)."""
    train_questions: str | None = None
    """Questions that the policy was trained on, for the overlap."""
    corpus: Path | None = None
    """Corpus of the controls, where the retriever is a server."""
    run_files: Path | None = None
    """Folder for BrowseComp-Plus' run files and its summary, which its own script reads."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """Language model that judges answers, where judge.url is given."""
    max_failed_share: float = 0.1
    """Share of the questions whose searches may fail before the evaluation stops."""
    keep_tokens: bool = False
    """Keep token ids and log-probs in trajectories.jsonl, which `sleuth replay` needs."""

    def __post_init__(self) -> None:
        require(0 <= self.max_failed_share <= 1, "max_failed_share", self.max_failed_share, "in [0, 1]")
        require_range(self, "", ">= 1", "samples", "max_rows")
        require(self.per_set is None or self.per_set > 0, "per_set", self.per_set, "> 0")
        many = self.samples > 1 and self.temperature == 0
        require(not many, "temperature", self.temperature, f"> 0 for {self.samples} samples")
        if self.controls:
            from agent.evaluation.controls import control_names

            control_names(self.controls)


def main(config: EvaluateConfig) -> None:
    """Score a policy on a question set; writes scores.json and trajectories.jsonl.

    The same command again goes on where it stopped, and asks failed searches again.
    """
    from agent.evaluation.controls import leaks

    training = load_questions(config.train_questions) if config.train_questions else []
    scores, questions, protocol = run(config)
    show_scores(scores, f"{config.policy} with {config.retriever}")
    if config.controls:
        show_controls(Path(config.out), scores, leaks(questions, training))
    judged = scores.get("judge", {})
    if errors := judged.get("errors"):
        failed = f"{counted(errors, 'answer')} could not be judged ({judged['first_error']})"
        print(f"{failed}: the same command asks again")
    if config.run_files:
        from agent.evaluation.browsecomp import write_run_files

        write_run_files(Path(config.out), config.run_files)
    if obstacle := _obstacle(scores, config.policy, protocol, config.out):
        print(obstacle)
    if scores["search_failed"]:
        print(f"{counted(scores['search_failed'], 'search')} failed: the same command asks again")


def run(config: EvaluateConfig) -> tuple[dict[str, Any], list[Question], str]:
    """Evaluate, or go on with it: the scores, the questions, the name of the protocol."""
    from agent.evaluation.browsecomp import check_run_files
    from agent.evaluation.evaluate import check_folder
    from agent.evaluation.judge import Judge
    from retriever_server.indexes.open_corpus import corpus_of
    from retriever_server.open_retriever import check_retriever
    from scripts.wiring import check_agent, open_asked

    out = config.out
    check_folder(out)
    check_agent(config.policy, config.protocol, config.device, config.engine)
    check_retriever(config.retriever, config.deadline_seconds)
    if config.corpus:
        corpus_of(config.corpus)
    judge = Judge(config.judge, Path(out) / "judge-cache.jsonl") if config.judge.url else None
    if judge and (reason := why_silent(str(config.judge.url))):
        raise EngineError(f"judge.url = {config.judge.url!r}: nobody listens ({reason})")
    questions = choose_questions(config)
    if config.run_files:
        check_run_files(config.run_files, questions)
    with locked(Path(out) / ".lock", f"{out} is being written"):
        opened = open_asked(config, config.max_rows, Path(out))
        with going_on(out):
            scores = asyncio.run(_evaluate(opened, questions, config))
            if judge:
                scores = judge_all(Path(out), judge)
    return scores, questions, opened.agent.protocol.name


def choose_questions(config: EvaluateConfig) -> list[Question]:
    """The questions that are asked, each as often as it is sampled."""
    from agent.evaluation.samples import sampled
    from data.formats.answer_sets import slice_of_each

    limit = None if config.per_set else config.limit
    questions = load_questions(config.questions, config.split, limit, config.normalizer)
    if config.per_set:
        questions = slice_of_each(questions, config.per_set)[: config.limit]
    return sampled(questions, config.samples)


def judge_all(out: Path, judge: Judge) -> dict[str, Any]:
    """Let the judge read every answer, and score anew."""
    from agent.evaluation.evaluate import rescore
    from agent.evaluation.judge import judge_folder

    folders = [out, *sorted(path.parent for path in out.glob("controls/*/trajectories.jsonl"))]
    for folder in folders:
        with bar(f"judging answers in {folder.name}") as move:
            judge_folder(folder, judge, move)
        rescore(folder)
    return rescore(out)


def _obstacle(scores: dict[str, Any], policy: str, protocol: str, out: str) -> str | None:
    """Say why no answer could count, where none is in the form of the protocol."""
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
    out = Path(config.out)
    async with opened:
        await opened.check()
        settings["retriever"] = await retriever_generation(opened.client, questions[0].text, config.retriever)
        rollout = rollout_with_bar(opened, config.seed, len(questions), out)
        scores = await evaluate(
            questions, rollout, out, settings, config.max_failed_share, config.keep_tokens
        )
        if config.controls:
            await _run_controls(opened, questions, config, settings)
        return scores


async def _run_controls(
    opened: OpenedAgent, questions: Sequence[Question], config: EvaluateConfig, settings: dict[str, Any]
) -> None:
    """Evaluate each control in a folder of its own; those that cannot be made are named."""
    from agent.evaluation.controls import control_agent, control_names, make_world
    from agent.evaluation.evaluate import evaluate
    from retriever_server.indexes.open_corpus import corpus_of

    world = make_world(corpus_of(config.corpus) if config.corpus else opened.client.corpus, questions)
    for name in control_names(config.controls or ""):
        asked = [question for question in questions if world.allows(name, question)]
        if not asked:
            print(f"no control {name}: it needs --corpus, and questions that name their gold passages")
            continue
        folder = Path(config.out) / "controls" / name
        make = partial(control_agent, name, world=world, seed=config.seed)
        rollout = rollout_with_bar(opened, config.seed, len(asked), Path(config.out), name, make)
        await evaluate(asked, rollout, folder, settings | {"control": name}, config.max_failed_share)


def rollout_with_bar(
    opened: OpenedAgent,
    seed: int,
    total: int,
    folder: Path,
    title: str = "answering questions",
    agent_for: Callable[..., Agent] | None = None,
):
    """The rollout function of the evaluation in `folder`, with a bar.

    agent_for: as that of `roll_out_each`.
    """
    from agent.evaluation.evaluate import roll_out_each
    from agent.prompt import frozen_frame

    async def rollout(todo, on_finished):
        frame = frozen_frame(folder, opened.agent.protocol, opened.agent.tokenizer)
        agent = replace(opened.agent, prompt_frame=frame)
        done = count(total - len(todo) + 1)
        with bar(title, total, total - len(todo)) as move:

            def finished(trajectory):
                on_finished(trajectory)
                move(next(done))

            await roll_out_each(agent, todo, seed, finished, agent_for)

    return rollout


def show_scores(scores: dict[str, Any], title: str) -> None:
    """Print scores as a table: over all questions, by set and by kind; then what else was measured."""
    from agent.evaluation.summary import describe, table

    columns, rows = table(scores)
    show_table(title, columns, rows)
    show_table("", ("measure", "value"), describe(scores))


def show_controls(out: Path, scores: dict[str, Any], found: dict[str, float]) -> None:
    """Print the controls beside the run, write them to controls.json, and say what leaks."""
    from agent.evaluation.compare import compare_controls
    from data.metrics.significance import format_estimate

    rows = compare_controls(out)
    write_json(out / "controls.json", {"format_version": 1, "controls": rows, "leaks": found})
    columns = ("control", "n", "EM [95 %]", "run less control", "answered", "I don't know")
    shown = [
        (
            name,
            str(row["n"]),
            format_estimate(row["em"]),
            format_estimate(row["difference"], signed=True),
            f"{row['coverage']:.3f}",
            f"{row['abstained_rate']:.3f}",
        )
        for name, row in rows.items()
    ]
    show_table("controls", columns, shown)
    show_table("", ("leak", "share of questions"), [(key, f"{value:.3f}") for key, value in found.items()])
