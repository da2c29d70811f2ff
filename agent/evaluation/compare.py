"""Two or more evaluations of the same questions: paired differences and the questions that flipped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
)
from data.errors import DataError
from data.jsonl import read_json
from data.significance import estimate


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
        "em": estimate((new - old)[:, None], clusters)[0],
    }
