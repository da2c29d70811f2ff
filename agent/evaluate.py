"""Trajectories in, scores out: EM, F1, searches a question, with intervals over clusters.

    evaluations/before/
      evaluation.json       {format_version, settings, ...}: what was evaluated; a resumed one must agree
      trajectories.jsonl    one compact record a question, in the order they finished
      scores.json           written last

Questions that share an entity fail together, so the bootstrap resamples clusters (`metadata["cluster"]`,
else the question itself), never single questions (percentile interval; Efron & Tibshirani 1993, ch. 13).
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from agent.trajectory import SegmentKind, StopReason, Trajectory
from agent.transcripts import to_record
from data.answers import METRICS
from data.errors import ConfigError, DataError, RunStopped, StorageError
from data.jsonl import read_json, read_jsonl, write_json, write_jsonl
from data.records import FORMAT_VERSION, Question, hash_questions
from data.run_dir import check_free, describe_difference
from data.significance import FEW_CLUSTERS, RESAMPLES, SEED, bootstrap
from data.significance import format_estimate as format_estimate  # of earlier versions

if TYPE_CHECKING:
    from agent.rollout import Agent


Record = Mapping[str, Any]
RolloutFn = Callable[[Sequence[Question], Callable[[Trajectory], None]], Awaitable[object]]
"""Rolls the questions out and calls back with each trajectory as it finishes."""


async def evaluate(
    questions: Sequence[Question],
    rollout_fn: RolloutFn,
    out_dir: Path | str,
    settings: Mapping[str, Any],
    max_failed_share: float = 0.1,
) -> dict[str, Any]:
    """Roll out every question once and write its scores; returns what scores.json holds.

    `settings` name all that decides the outcome: policy, protocol, the retriever's generation,
    sampling. Starting again in the same folder asks only the questions that have no record yet, and
    those whose search failed. Raises ConfigError where the folder holds another evaluation, DataError
    where a question came back twice or never, StorageError where the disk refuses, RunStopped once
    searches have failed in more than `max_failed_share` of the questions.
    """
    out_dir = Path(out_dir)
    _check_unique([question.id for question in questions], "questions")
    _open_evaluation(out_dir, questions, settings)
    path = out_dir / "trajectories.jsonl"
    records = {record["id"]: record for record in _resume(path)}
    todo = [question for question in questions if question.id not in records]
    failed = 0
    if todo:
        # Half of a surrogate pair, which no UTF-8 holds, becomes its \\u escape: still JSON.
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:

            def on_finished(trajectory: Trajectory) -> None:
                record = evaluation_record(trajectory)
                if record["id"] in records:
                    raise DataError(f"question {record['id']!r} was rolled out twice")
                _append(file, record)
                records[record["id"]] = brief(record)
                if _failed(record):
                    nonlocal failed
                    failed += 1
                    if failed > max_failed_share * len(questions):
                        raise RunStopped(_too_many(failed, len(records), record, out_dir))

            await rollout_fn(todo, on_finished)
    scores = score(list(records.values()), questions)
    write_json(out_dir / "scores.json", scores)
    return scores


async def roll_out_each(
    agent: Agent, questions: Sequence[Question], seed: int, on_finished: Callable[[Trajectory], None]
) -> None:
    """Roll out each question once, at most `agent.max_live` at a time, and keep no trajectory.

    What a question's trajectory draws depends on `seed` and the question alone, not on which others are
    asked: an evaluation that goes on samples as one in one go. Raises as `Agent.rollout`.
    """
    left = iter(questions)

    async def work() -> None:
        for question in left:
            on_finished((await agent.rollout([question], seed, keys=[0]))[0])

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(agent.max_live, len(questions))):
                group.create_task(work())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


def evaluation_record(trajectory: Trajectory) -> dict[str, Any]:
    """The compact record of a trajectory with its own `em`, `f1` and `cover_em`."""
    record = to_record(trajectory, tokens=False)
    return record | {name: value for name, value in zip(METRICS, _judge(record), strict=True)}


def read_records(out_dir: Path | str) -> list[dict[str, Any]]:
    """The records of an evaluation folder; a last line cut by a kill is left out."""
    return list(read_jsonl(Path(out_dir) / "trajectories.jsonl", tolerate_cut_tail=True))


def score(
    trajectories: Iterable[Trajectory | Record], questions: Sequence[Question] | None = None
) -> dict[str, Any]:
    """The scores of a set of trajectories (or their records), overall and `by_kind`.

    A failed search counts as a wrong answer and is shown as `search_failed`. Raises DataError where
    there is nothing to score, a question occurs twice or, given `questions`, one is missing or unknown.
    """
    records = [to_record(t, tokens=False) if isinstance(t, Trajectory) else t for t in trajectories]
    if not records:
        raise DataError("nothing to score: 0 trajectories")
    ids = [record["id"] for record in records]
    _check_unique(ids, "trajectories")
    if questions is not None:
        _check_same({question.id for question in questions}, set(ids), "questions", "trajectories")
    by_kind = {
        kind: _summary([record for record in records if _kind(record) == kind]) for kind in _kinds(records)
    }
    head = {"format_version": FORMAT_VERSION, "resamples": RESAMPLES, "seed": SEED}
    return head | _summary(records) | {"by_kind": by_kind}


def paired_difference(before: Iterable[Record], after: Iterable[Record]) -> dict[str, Any]:
    """EM after minus EM before on the same questions, with its interval, overall and `by_kind`.

    Raises DataError, naming the questions, where the two do not hold the same ones.
    """
    old = {record["id"]: record for record in before}
    new = {record["id"]: record for record in after}
    _check_same(set(old), set(new), "before", "after")
    if not old:
        raise DataError("nothing to compare: 0 trajectories")
    pairs = [(record, new[id_]) for id_, record in old.items()]
    by_kind = {
        kind: _difference([pair for pair in pairs if _kind(pair[0]) == kind]) for kind in _kinds(old.values())
    }
    return _difference(pairs) | {"by_kind": by_kind}


def _judge(record: Record) -> list[float]:
    """The metrics of one record, in the order of METRICS; no answer scores 0."""
    answer, gold_answers = record["answer"], record["gold_answers"]
    if answer is None or _failed(record):
        return [0.0] * len(METRICS)
    normalizer = record["metadata"].get("normalizer", "squad")
    return [float(metric(answer, gold_answers, normalizer)) for metric in METRICS.values()]


def _summary(records: Sequence[Record]) -> dict[str, Any]:
    """All scores of some records; the same shape overall and for one kind."""
    values = np.array([_judge(record) for record in records])  # (N, metrics)
    estimates = _estimates(values, records)
    stops = Counter(record["stop_reason"] for record in records)
    return {
        "n": len(records),
        "clusters": len({_cluster(record) for record in records}),
        **dict(zip(METRICS, estimates, strict=True)),
        "searches_per_question": _mean(len(record["searches"]) for record in records),
        "valid_format_rate": _mean(record["valid_format"] for record in records),
        "answered_rate": stops[StopReason.ANSWERED] / len(records),
        "search_failed": stops[StopReason.SEARCH_FAILED],
        "stop_reasons": dict(sorted(stops.items())),
        "invalid_actions_per_question": _mean(record["invalid_actions"] for record in records),
        "policy_tokens_per_question": _mean(_policy_tokens(record) for record in records),
    }


def _difference(pairs: Sequence[tuple[Record, Record]]) -> dict[str, Any]:
    old = np.array([_judge(before)[0] for before, _ in pairs])
    new = np.array([_judge(after)[0] for _, after in pairs])
    records = [before for before, _ in pairs]
    return {
        "n": len(pairs),
        "clusters": len({_cluster(record) for record in records}),
        "before": float(old.mean()),
        "after": float(new.mean()),
        "em": _estimates((new - old)[:, None], records)[0],
    }


def _estimates(values: np.ndarray, records: Sequence[Record]) -> list[dict[str, Any]]:
    """Mean, low and high of each column, and the number of clusters where these are few.

    One cluster alone says nothing of spread: low and high None.
    """
    clusters = [_cluster(record) for record in records]
    means = values.mean(axis=0).tolist()
    count = len(set(clusters))
    few = {"few_clusters": count} if count < FEW_CLUSTERS else {}
    if count < 2:
        return [{"mean": mean, "low": None, "high": None} for mean in means]
    low, high = bootstrap(values, clusters).tolist()
    rows = zip(means, low, high, strict=True)
    return [dict(zip(("mean", "low", "high"), row, strict=True)) | few for row in rows]


def _kind(record: Record) -> str:
    return str(record["metadata"].get("kind", "all"))


def _kinds(records: Iterable[Record]) -> list[str]:
    """The kinds there are: by number of hops where their names say it, then by name."""
    hops = {"one_hop": 1, "two_hop": 2, "three_hop": 3}
    return sorted({_kind(record) for record in records}, key=lambda kind: (hops.get(kind, 9), kind))


def _cluster(record: Record) -> str:
    """The unit of resampling; prefixed, so that a question's id never joins a cluster of that name."""
    cluster = record["metadata"].get("cluster")
    return f"id:{record['id']}" if cluster is None else f"cluster:{cluster}"


def _policy_tokens(record: Record) -> int:
    policy = [segment for segment in record["segments"] if segment["kind"] == "policy"]
    return sum(s["tokens"] if "tokens" in s else len(s["token_ids"]) for s in policy)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean([float(value) for value in values]))


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
            if not _failed(record):
                kept.append(brief(record))
                yield record

    write_jsonl(path, standing())
    _check_unique([record["id"] for record in kept], str(path))
    return kept


def brief(record: Record) -> Record:
    """Reduce a record to what scoring needs: no text of passages, so that many fit in memory."""
    segments = [s for s in record["segments"] if s["kind"] == SegmentKind.POLICY]
    tokens = [{"kind": segment["kind"], "tokens": segment["tokens"]} for segment in segments]
    return {**record, "segments": tokens, "searches": [None] * len(record["searches"])}


def _failed(record: Record) -> bool:
    return record["stop_reason"] == StopReason.SEARCH_FAILED


def _too_many(failed: int, asked: int, record: Record, out_dir: Path) -> str:
    reason = record["searches"][-1]["error"]
    return (
        f"searches failed for {failed} of {asked} questions asked ({reason}); the others "
        f"are kept in {out_dir}: start the same command again to go on"
    )


def _append(file: IO[str], record: Record) -> None:
    try:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
    except OSError as error:
        raise StorageError(f"cannot write {file.name}: {error.strerror}") from error


def _check_unique(ids: Sequence[str], where: str) -> None:
    repeated = [id_ for id_, count in Counter(ids).items() if count > 1]
    if repeated:
        raise DataError(f"{where}: question ids occur more than once: {_some(repeated)}")


def _check_same(left: set[str], right: set[str], left_name: str, right_name: str) -> None:
    for here, there, name in ((left, right, right_name), (right, left, left_name)):
        if here - there:
            raise DataError(f"{name}: missing {len(here - there)} questions: {_some(here - there)}")


def _some(ids: Iterable[str]) -> str:
    names = sorted(ids)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
