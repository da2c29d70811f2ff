"""Records of evaluations, one a question (`measures.evaluation_record`): read, reduced, judged by gold."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.jsonl import read_jsonl
from data.metrics.answers import METRICS, is_abstention
from data.text import counted

Record = Mapping[str, Any]

MATRIX_FILE = "matrix.json"
_FIELDS: dict[str, Any] = {
    "id": str, "question": str, "gold_answers": list, "metadata": dict, "answer": (str, type(None)),
    "stop_reason": str, "valid_format": bool, "invalid_actions": int, "segments": list, "searches": list,
}  # fmt: skip
_KEYS_OF_ITEMS = {"segments": {"kind", "text"}, "searches": {"query", "hits"}}

JUDGEMENTS = "judgements.jsonl"
"""Beside trajectories.jsonl: the verdicts of a judge, by question id."""


def judge_answer(record: Record) -> list[float]:
    """The metrics of one record, in the order of METRICS; no answer scores 0."""
    answer, gold_answers = record["answer"], record["gold_answers"]
    if answer is None or failed(record):
        return [0.0] * len(METRICS)
    normalizer = record["metadata"].get("normalizer", "squad")
    return [float(metric(answer, gold_answers, normalizer)) for metric in METRICS.values()]


def iterate_records(out_dir: Path | str) -> Iterator[dict[str, Any]]:
    """The records of an evaluation folder one by one, each with its judge's verdict if there is one.

    A last line cut by a kill is left out. Raises DataError for what is no record, or one more of a question.
    """
    file, path = Path(out_dir) / JUDGEMENTS, Path(out_dir) / "trajectories.jsonl"
    verdicts = {each.get("id"): each for each in read_jsonl(file)} if file.exists() else {}
    seen: set[str] = set()
    for record in read_jsonl(path, tolerate_cut_tail=True):
        wrong = [key for key, kind in _FIELDS.items() if not isinstance(record.get(key, seen), kind)]
        wrong += [name for name in METRICS if not isinstance(record.get(name, 0.0), int | float)]
        wrong = wrong or _wrong_lists(record)
        if wrong or record["id"] in seen:
            what = f"missing or wrong: {', '.join(wrong)}" if wrong else "is there twice"
            raise DataError(f"{path}: trajectory {record.get('id')!r}: {what}")
        seen.add(record["id"])
        if not METRICS.keys() <= record.keys():  # a metric is younger than the record
            record = {**dict(zip(METRICS, judge_answer(record), strict=True)), **record}
        verdict = verdicts.get(record["id"])
        # One about an answer that was given since stands for nothing.
        if verdict and verdict.get("answer", seen) == record["answer"]:
            record["judge"] = verdict
        yield record


def _wrong_lists(record: Record) -> list[str]:
    """The keys of lists that hold something else than they should."""
    wrong = [] if all(isinstance(each, str) for each in record["gold_answers"]) else ["gold_answers"]
    return wrong + [
        name
        for name, keys in _KEYS_OF_ITEMS.items()
        if not all(isinstance(each, dict) and keys <= each.keys() for each in record[name])
    ]


def read_records(out_dir: Path | str) -> list[dict[str, Any]]:
    """The records of an evaluation folder; a last line cut by a kill is left out."""
    return list(iterate_records(out_dir))


def brief(record: Record) -> Record:
    """Reduce a record to what scoring needs: no text of passages, so that many fit in memory."""
    segments = [s for s in record["segments"] if s["kind"] == "policy"]
    tokens = [{"kind": segment["kind"], "tokens": _size(segment)} for segment in segments]
    return {**record, "segments": tokens, "searches": [None] * len(record["searches"])}


def failed(record: Record) -> bool:
    """Return whether its retriever could not be reached."""
    return bool(record["stop_reason"] == "search_failed")


def question_of(record: Record) -> str:
    """The id of its question; several samples of one share it."""
    return str(record["metadata"].get("sample_of", record["id"]))


def kind_of(record: Record) -> str:
    """The kind of its question, `all` where it has none."""
    return str(record["metadata"].get("kind", "all"))


def cluster_of(record: Record) -> str:
    """The unit of resampling; prefixed, so that a question's id never joins a cluster of that name."""
    cluster = record["metadata"].get("cluster")
    return f"id:{question_of(record)}" if cluster is None else f"cluster:{cluster}"


def clusters_of(records: Iterable[Record]) -> list[str]:
    """The cluster of each."""
    return [cluster_of(record) for record in records]


def verdict_of(record: Record) -> float:
    """1.0 where the answer counts as right: by the judge where one has spoken, else by exact match."""
    verdict = record.get("judge", {}).get("verdict")
    return judge_answer(record)[0] if verdict is None else float(verdict == "correct")


def attempted(record: Record) -> bool:
    """Return whether an answer was given that is no "I don't know"."""
    if record.get("judge", {}).get("verdict") == "not_attempted":
        return False
    return bool(record["answer"]) and not is_abstention(record["answer"])


def response_of(record: Record) -> str:
    """The whole text of its answer, with citations and confidence where the protocol asks for them."""
    turns = [segment["text"] for segment in record["segments"] if segment["kind"] == "policy"]
    return full_answer(turns[-1] if turns else "")


def full_answer(turn: str) -> str:
    """Return the text between the tags of the answer; every protocol has the same."""
    found = re.search(r"<answer>(.*?)</answer>", turn, re.DOTALL)
    return found[1].strip() if found else ""


def trajectory_table(records: Iterable[Record], limit: int = 50) -> tuple[tuple[str, ...], list[list[Any]]]:
    """Columns and rows of the first trajectories, for a tracker."""
    rows = [
        [r["id"], r["question"], " | ".join(r["gold_answers"]), r["answer"], r["em"], r["f1"],
         r["stop_reason"],
         " | ".join(search["query"] for search in r["searches"]),
         "".join(segment["text"] for segment in r["segments"] if segment["kind"] == "policy")]
        for r in islice(records, limit)
    ]  # fmt: skip
    return ("id", "question", "gold answers", "answer", "EM", "F1", "stop reason", "queries", "written"), rows


def policy_tokens(record: Record) -> int:
    """Tokens that the policy wrote."""
    policy = [segment for segment in record["segments"] if segment["kind"] == "policy"]
    return sum(map(_size, policy))


def _size(segment: Mapping[str, Any]) -> int:
    return segment["tokens"] if "tokens" in segment else len(segment["token_ids"])


def check_unique(ids: Sequence[str], where: str) -> None:
    """Raise DataError where an id occurs twice."""
    repeated = [id_ for id_, count in Counter(ids).items() if count > 1]
    if repeated:
        raise DataError(f"{where}: question ids occur more than once: {_some(repeated)}")


def check_same(left: set[str], right: set[str], left_name: str, right_name: str) -> None:
    """Raise DataError, naming the questions, where the two differ."""
    for here, there, name in ((left, right, right_name), (right, left, left_name)):
        if here - there:
            raise DataError(
                f"{name}: missing {counted(len(here - there), 'question')}: {_some(here - there)}"
            )


def _some(ids: Iterable[str]) -> str:
    names = sorted(ids)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
