"""Two or more evaluations of the same questions: paired differences and the questions that flipped."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from agent.evaluation.records import (
    Record,
    brief,
    check_same,
    clusters_of,
    iterate_records,
    judge_answer,
    kind_of,
    policy_tokens,
    question_of,
    verdict_of,
)
from data.atomic import open_atomic
from data.errors import ConfigError, DataError
from data.jsonl import read_json
from data.metrics.answers import METRICS
from data.metrics.significance import estimate, format_estimate

logger = logging.getLogger(__name__)

_NAMES = {"em": "EM", "f1": "F1", "cover_em": "cover EM"}


def _judged(place: int, record: Record) -> float:
    return judge_answer(record)[place]


MEASURES: dict[str, Callable[[Record], float]] = {
    **{_NAMES.get(name, name): partial(_judged, place) for place, name in enumerate(METRICS)},
    "judge": verdict_of,
    "evidence recall": lambda record: record["evidence_recall"],
    "searches": lambda record: len(record["searches"]),
    "tokens written": policy_tokens,
}
"""Metrics that runs are compared by; evidence and judge (the same one) only where all records have them."""

Runs = Mapping[str, Sequence[Record]]
"""Name -> its records, those of several samples too."""


def read_runs(specs: Sequence[str]) -> dict[str, list[Record]]:
    """The records of runs, without texts of passages. A run is a folder, or several with commas between.

    Several, such as those of three seeds, are samples of one run. ConfigError for what is no evaluation.
    """
    if len(specs) < 2:
        raise ConfigError("compare: give at least two runs")
    if len(set(specs)) < len(specs):
        raise ConfigError(f"compare: {max(specs, key=list(specs).count)} is given twice")
    return dict(zip(short_names(specs), map(_read_run, specs), strict=True))


def short_names(specs: Sequence[str]) -> list[str]:
    """Names as short as they may be: what all paths begin with is left out."""
    parts = [spec.split(",")[0].strip("/").split("/") for spec in specs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return list(specs)


def _read_run(spec: str) -> list[Record]:
    folders = [Path(part.strip()) for part in spec.split(",") if part.strip()]
    found: list[Record] = []
    for number, folder in enumerate(folders, start=1):
        if not (folder / "trajectories.jsonl").exists():
            inside = sorted(str(path.parent) for path in folder.rglob("trajectories.jsonl"))[:5]
            hint = f"; it holds {', '.join(inside)}" if inside else ""
            raise ConfigError(f"{folder}: is no evaluation (no trajectories.jsonl){hint}")
        for record in map(brief, iterate_records(folder)):
            if number > 1:
                sample = {**record["metadata"], "sample_of": question_of(record)}
                record = {**record, "id": f"{record['id']}~{number}", "metadata": sample}
            found.append({**record})
    return found


def compare(runs: Runs, common: bool = False) -> dict[str, Any]:
    """Each run against the first, on the same questions.

    measures: name -> a list, one of each run, of {mean, low, high, difference (paired, to the first; None
    for it)}. flipped: run -> {fixed, broken}: ids of questions wrong in the first and right here,
    and the other way round; of several samples the majority counts. common: leave out questions that
    a run does not have; else DataError names them. Right is what the judge says where it has judged
    all records of all runs, else EM.
    """
    by_question = {name: _by_question(records) for name, records in runs.items()}
    names = list(by_question)
    first = by_question[names[0]]
    ids = [id_ for id_ in first if all(id_ in of for of in by_question.values())]
    for name in names[1:]:
        if not common:
            check_same(set(first), set(by_question[name]), names[0], name)
    if not ids:
        raise DataError("nothing to compare: the runs share no question")
    clusters = clusters_of(first[id_][0] for id_ in ids)
    measured = {}
    for measure, value in MEASURES.items():
        if _has(measure, runs.values()):
            columns = [_means(of, ids, value) for of in by_question.values()]
            measured[measure] = _against_first(columns, clusters)
    judge = MEASURES["judge" if "judge" in measured else "EM"]  # of all runs the same
    right = {name: _means(of, ids, judge) >= 0.5 for name, of in by_question.items()}
    flipped = {name: _flips(ids, right[names[0]], right[name]) for name in names[1:]}
    return {
        "format_version": 1,
        "runs": names,
        "n": len(ids),
        "clusters": len(set(clusters)),
        "measures": measured,
        "flipped": flipped,
    }


def _against_first(columns: Sequence[np.ndarray], clusters: Sequence[str]) -> list[dict[str, Any]]:
    own = estimate(np.column_stack(columns), clusters)
    differences = estimate(np.column_stack([column - columns[0] for column in columns]), clusters)
    return [
        each | {"difference": difference if number else None}
        for number, (each, difference) in enumerate(zip(own, differences, strict=True))
    ]


def _flips(ids: Sequence[str], before: np.ndarray, after: np.ndarray) -> dict[str, list[str]]:
    pairs = list(zip(ids, before, after, strict=True))
    return {
        "fixed": [id_ for id_, old, new in pairs if new and not old],
        "broken": [id_ for id_, old, new in pairs if old and not new],
    }


def _has(measure: str, runs: Iterable[Sequence[Record]]) -> bool:
    records = [record for of in runs for record in of]
    if measure == "judge":
        return _one_judge(records)
    return measure != "evidence recall" or all(r.get("evidence_recall") is not None for r in records)


def _one_judge(records: Sequence[Record]) -> bool:
    """Return whether one judge has ruled on all of them; a warning names several."""
    rulings = [record.get("judge", {}) for record in records]
    if not all(ruling.get("verdict") for ruling in rulings):
        return False
    judges = {" ".join(str(each.get(key)) for key in ("model", "rubric", "prompt")) for each in rulings}
    if len(judges) > 1:
        logger.warning("verdicts of different judges are not compared: %s", "; ".join(sorted(judges)))
    return len(judges) == 1


def _by_question(records: Iterable[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(question_of(record), []).append(record)
    return found


def _means(
    of: Mapping[str, Sequence[Record]], ids: Sequence[str], value: Callable[[Record], float]
) -> np.ndarray:
    return np.array([np.mean([value(record) for record in of[id_]]) for id_ in ids])


def table(compared: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows for people: the measures, then the counts of flipped questions."""
    names = compared["runs"]
    columns = ("measure", names[0], *(each for name in names[1:] for each in (name, "difference [95 %]")))
    rows = []
    for measure, of in compared["measures"].items():
        own = [f"{each['mean']:.3f}" for each in of]
        more = [
            cell
            for each, text in zip(of[1:], own[1:], strict=True)
            for cell in (text, format_estimate(each["difference"], signed=True))
        ]
        rows.append((measure, own[0], *more))
    for kind in ("fixed", "broken"):
        counts = [str(len(compared["flipped"][name][kind])) for name in names[1:]]
        rows.append((kind, "", *(cell for count in counts for cell in (count, ""))))
    return columns, rows


def write_csv(path: Path, runs: Runs) -> None:
    """A row for each record of all runs: run, id, question, kind, gold answers, answer, scores, costs."""
    with open_atomic(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        keys = ("stop_reason", "confidence", "seconds", "tokens_in", "tokens_out", "evidence_recall")
        names = ("run", "id", "question", "kind", "gold_answers", "answer", *METRICS, "judge")
        writer.writerow((*names, "searches", *keys))
        for name, records in runs.items():
            for record in records:
                golds = " | ".join(record["gold_answers"])
                verdict = record.get("judge", {}).get("verdict")
                told = (name, record["id"], record["question"], kind_of(record), golds, record["answer"])
                own = (*judge_answer(record), verdict, len(record["searches"]))
                writer.writerow((*map(_harmless, told), *own, *(record.get(key) for key in keys)))


def _harmless(cell: Any) -> Any:
    """A text that no spreadsheet takes for a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell


def paired_difference(before: Iterable[Record], after: Iterable[Record]) -> dict[str, Any]:
    """EM after minus EM before on the same questions, with its interval, overall and `by_kind`.

    Raises DataError, naming the questions, where the two do not hold the same ones.
    """
    old = {record["id"]: record for record in before}
    new = {record["id"]: record for record in after}
    check_same(set(old), set(new), "before", "after")
    if not old:
        raise DataError("nothing to compare: 0 trajectories")
    pairs = [(record, new[id_]) for id_, record in old.items()]
    kinds = dict.fromkeys(kind_of(record) for record in old.values())
    by_kind = {kind: _difference([pair for pair in pairs if kind_of(pair[0]) == kind]) for kind in kinds}
    return _difference(pairs) | {"by_kind": by_kind}


def compare_controls(out_dir: Path) -> dict[str, dict[str, Any]]:
    """Each control of an evaluation by name: scores, and EM of the run less that of the control, paired."""
    run = {record["id"]: brief(record) for record in iterate_records(out_dir)}
    rows = {}
    for folder in sorted(path.parent for path in out_dir.glob("controls/*/scores.json")):
        control = [brief(record) for record in iterate_records(folder)]
        pair = _difference([(record, run[record["id"]]) for record in control])
        scores = read_json(folder / "scores.json")
        kept = {key: scores[key] for key in ("n", "em", "f1", "coverage", "abstained_rate")}
        rows[folder.name] = kept | {"difference": pair["em"]}
    return rows


def _difference(pairs: Sequence[tuple[Record, Record]]) -> dict[str, Any]:
    old = np.array([judge_answer(before)[0] for before, _ in pairs])
    new = np.array([judge_answer(after)[0] for _, after in pairs])
    clusters = clusters_of(before for before, _ in pairs)
    return {
        "n": len(pairs),
        "clusters": len(set(clusters)),
        "before": float(old.mean()),
        "after": float(new.mean()),
        "fixed": int(((new > 0) & (old == 0)).sum()),
        "broken": int(((new == 0) & (old > 0)).sum()),
        "em": estimate((new - old)[:, None], clusters)[0],
    }
