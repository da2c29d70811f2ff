"""Trajectories in, scores out: every question is rolled out once, across any number of restarts.

evaluations/before/
  evaluation.json       {format_version, settings, ...}: what was evaluated; a resumed one must agree
  trajectories.jsonl    one compact record a question, in the order they finished
  scores.json           written last
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.evaluation.measures import evaluation_record
from agent.evaluation.records import Record, brief, check_unique, failed, iterate_records
from agent.evaluation.scores import score
from agent.trajectory import Trajectory
from data.errors import ConfigError, DataError, RunStopped, StorageError
from data.jsonl import read_json, read_jsonl, write_json, write_jsonl
from data.records import FORMAT_VERSION, Question, hash_questions
from data.run_dir import check_free, describe_difference

if TYPE_CHECKING:
    from agent.rollout import Agent

RolloutFn = Callable[[Sequence[Question], Callable[[Trajectory], None]], Awaitable[object]]
"""Rolls the questions out and calls back with each trajectory as it finishes."""


async def evaluate(
    questions: Sequence[Question],
    rollout_fn: RolloutFn,
    out_dir: Path | str,
    settings: Mapping[str, Any],
    max_failed_share: float = 0.1,
    tokens: bool = False,
) -> dict[str, Any]:
    """Roll out every question once and write its scores; returns what scores.json holds.

    `settings` name all that decides the outcome: policy, protocol, the retriever's generation,
    sampling; tokens: keep token ids and log-probs. Starting again in the same folder asks only the questions
    that have no record yet, and those whose search failed. Raises ConfigError where the folder holds another
    evaluation, DataError where a question came back twice or never, StorageError where the disk refuses,
    RunStopped once searches have failed in more than `max_failed_share` of the questions.
    """
    out_dir = Path(out_dir)
    check_unique([question.id for question in questions], "questions")
    _open_evaluation(out_dir, questions, settings)
    path = out_dir / "trajectories.jsonl"
    records = {record["id"]: record for record in _resume(path)}
    todo = [question for question in questions if question.id not in records]
    failures = 0
    if todo:
        with path.open("ab", buffering=0) as file:  # else what did not fit is written again as it is closed

            def on_finished(trajectory: Trajectory) -> None:
                record = evaluation_record(trajectory, tokens)
                if record["id"] in records:
                    raise DataError(f"question {record['id']!r} was rolled out twice")
                _append(file, record)
                records[record["id"]] = brief(record)
                if failed(record):
                    nonlocal failures
                    failures += 1
                    if failures > max_failed_share * len(questions):
                        raise RunStopped(_too_many(failures, len(records), record, out_dir))

            await rollout_fn(todo, on_finished)
    scores = score(list(records.values()), questions)
    write_json(out_dir / "scores.json", scores)
    return scores


def rescore(out_dir: Path) -> dict[str, Any]:
    """Score the records that are there anew, with the verdicts of a judge, and write scores.json."""
    scores = score(map(brief, iterate_records(out_dir)))
    write_json(out_dir / "scores.json", scores)
    return scores


async def roll_out_each(
    agent: Agent,
    questions: Sequence[Question],
    seed: int,
    on_finished: Callable[[Trajectory], None],
    agent_for: Callable[..., Agent] | None = None,
) -> None:
    """Roll out each question once, at most `agent.max_live` at a time, and keep no trajectory.

    What a question's trajectory draws depends on `seed` and the question alone, not on which others are
    asked: an evaluation that goes on samples as one in one go. `agent_for(agent=..., question=...)` gives the
    agent of a question, where it is another one for each. Raises as `Agent.rollout`.
    """
    left = iter(questions)

    async def work() -> None:
        for question in left:
            own = agent_for(agent=agent, question=question) if agent_for else agent
            on_finished((await own.rollout([question], seed, keys=[0]))[0])

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(agent.max_live, len(questions))):
                group.create_task(work())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


def _open_evaluation(out_dir: Path, questions: Sequence[Question], settings: Mapping[str, Any]) -> None:
    """Write evaluation.json, or refuse the folder where it holds an evaluation of something else."""
    plain = json.loads(json.dumps(settings, default=str))
    now = {"format_version": FORMAT_VERSION, **plain}
    now |= {"n": len(questions), "questions": hash_questions(questions), "folder": str(Path.cwd())}
    path = out_dir / "evaluation.json"
    check_folder(out_dir)
    if not path.exists():
        return write_json(path, now)
    then = read_json(path)
    folder = then.pop("folder", "")  # where its relative paths begin; no part of what was evaluated
    changed = describe_difference(then, {key: now[key] for key in now if key != "folder"}, folder=folder)
    if changed:
        raise ConfigError(f"{out_dir} holds another evaluation ({'; '.join(changed)}): choose another folder")


def check_folder(out_dir: Path | str) -> None:
    """Raise ConfigError where the folder holds something else than an evaluation, or its servers' logs."""
    folder = Path(out_dir)
    if not (folder / "evaluation.json").exists():
        check_free(folder, {path.name for path in folder.glob("vllm-*.log")})


def _resume(path: Path) -> list[Record]:
    """The records that stand: failed searches, and a last line cut by a kill, are taken off the file."""
    if not path.exists():
        return []
    kept: list[Record] = []

    def standing() -> Iterator[Record]:
        for record in read_jsonl(path, tolerate_cut_tail=True):
            if not failed(record):
                kept.append(brief(record))
                yield record

    write_jsonl(path, standing())
    check_unique([record["id"] for record in kept], str(path))
    return kept


def _too_many(failed: int, asked: int, record: Record, out_dir: Path) -> str:
    reason = record["searches"][-1]["error"]
    return (
        f"searches failed for {failed} of {asked} questions asked ({reason}); the others "
        f"are kept in {out_dir}: start the same command again to go on"
    )


def _append(file: FileIO, record: Record) -> None:
    # Half of a surrogate pair, which no UTF-8 holds, becomes its \\u escape: still JSON.
    line = (json.dumps(record, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
    try:
        while line:  # one write may take a part only
            line = line[file.write(line) :]
    except OSError as error:
        raise StorageError(f"cannot write {file.name}: {error.strerror}") from error
