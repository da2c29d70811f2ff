"""Scores of a run: means with intervals over clusters, selective answering, calibration, cost.

Questions that share an entity fail together, so the bootstrap resamples clusters (`metadata["cluster"]`,
else the question itself), never single questions (percentile interval; Efron & Tibshirani 1993, ch. 13).
Several samples of a question are averaged first.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from agent.evaluation.records import (
    Record,
    attempted,
    check_same,
    check_unique,
    cluster_of,
    clusters_of,
    judge_answer,
    kind_of,
    policy_tokens,
    question_of,
    verdict_of,
)
from agent.evaluation.samples import pass_at
from agent.trajectory import StopReason, Trajectory
from data.errors import DataError
from data.formats.answer_sets import official_metric
from data.metrics.answers import METRICS, OFFICIAL
from data.metrics.calibration import auc, brier_score, expected_calibration_error, risk_coverage
from data.metrics.significance import RESAMPLES, SEED, estimate
from data.records import FORMAT_VERSION, Question

_COVERAGES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def score(
    trajectories: Iterable[Trajectory | Record], questions: Sequence[Question] | None = None
) -> dict[str, Any]:
    """The scores of a set of trajectories (or their records), overall, `by_kind` and by set.

    A failed search counts as a wrong answer and is shown as `search_failed`. Raises DataError where
    there is nothing to score, a question occurs twice or, given `questions`, one is missing or unknown.
    """
    from agent.evaluation.measures import evaluation_record

    records = [evaluation_record(t) if isinstance(t, Trajectory) else t for t in trajectories]
    if not records:
        raise DataError("nothing to score: 0 trajectories")
    ids = [record["id"] for record in records]
    check_unique(ids, "trajectories")
    if questions is not None:
        check_same({question.id for question in questions}, set(ids), "questions", "trajectories")
    head = {"format_version": FORMAT_VERSION, "resamples": RESAMPLES, "seed": SEED}
    by_kind = {kind: _summary(of) for kind, of in _groups(records, kind_of).items()}
    sets = _groups(records, lambda record: str(record["metadata"].get("data_source", "")))
    by_set = {name: _summary(of) for name, of in sets.items()} if len(sets) > 1 else {}
    more = {"by_set": by_set, "macro_em": macro_mean([s["em"] for s in by_set.values()])} if by_set else {}
    return head | _summary(records) | {"by_kind": by_kind} | more


def macro_mean(estimates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean over sets, each of the same weight, whatever its size.

    The sets are independent: the squares of their intervals' half-widths add up.
    """
    mean = float(np.mean([each["mean"] for each in estimates]))
    if any(each["low"] is None for each in estimates):
        return {"mean": mean, "low": None, "high": None}
    below = [each["mean"] - each["low"] for each in estimates]
    above = [each["high"] - each["mean"] for each in estimates]
    low, high = (float(np.linalg.norm(side)) / len(estimates) for side in (below, above))
    return {"mean": mean, "low": mean - low, "high": mean + high}


def _summary(records: Sequence[Record]) -> dict[str, Any]:
    """All scores of some records; the same shape overall and for one kind."""
    asked = list(_groups(records, question_of, ordered=False).values())
    first = [samples[0] for samples in asked]
    answers = [np.array([judge_answer(each) for each in samples]) for samples in asked]
    estimates = estimate(np.array([each.mean(axis=0) for each in answers]), clusters_of(first))
    stops = Counter(record["stop_reason"] for record in records)
    return {
        "n": len(asked),
        "clusters": len({cluster_of(record) for record in records}),
        **dict(zip(METRICS, estimates, strict=True)),
        "searches_per_question": mean_of(len(record["searches"]) for record in records),
        "valid_format_rate": mean_of(record["valid_format"] for record in records),
        "answered_rate": stops[StopReason.ANSWERED] / len(records),
        "search_failed": stops[StopReason.SEARCH_FAILED],
        "stop_reasons": dict(sorted(stops.items())),
        "invalid_actions_per_question": mean_of(record["invalid_actions"] for record in records),
        "policy_tokens_per_question": mean_of(policy_tokens(record) for record in records),
        **_official(records),
        **_sampled(answers, first),
        **_judged(records),
        **_selective(records),
        **_searching(records),
        **_cost(records),
    }


def _official(records: Sequence[Record]) -> dict[str, Any]:
    """The metric of a well-known set's own script, where all questions are of that set."""
    sets = {str(record["metadata"].get("data_source")) for record in records}
    name = official_metric(sets.pop()) if len(sets) == 1 else None
    if name in METRICS or name not in OFFICIAL:
        return {}
    values = [OFFICIAL[name](record["answer"], record["gold_answers"]) for record in records]
    return {"official": {"metric": name, **_mean_by_question(records, values)}}


def _sampled(answers: Sequence[np.ndarray], first: Sequence[Record]) -> dict[str, Any]:
    """pass@k of the EM of several samples; nothing where each question was answered once."""
    counts = {len(each) for each in answers}
    if counts == {1}:
        return {}
    if len(counts) > 1:
        raise DataError(
            f"questions have from {min(counts)} to {max(counts)} samples: must be as many of each"
        )
    right = np.array([each[:, 0] > 0 for each in answers]).sum(axis=1)  # (N,)
    [total] = counts
    passed = {k: pass_at(k, right, total) for k in (*(2**i for i in range(1, 20) if 2**i < total), total)}
    rows = estimate(np.column_stack(list(passed.values())), clusters_of(first))
    return {"samples": total, "pass": {str(k): row for k, row in zip(passed, rows, strict=True)}}


def _judged(records: Sequence[Record]) -> dict[str, Any]:
    """The judge's accuracy, where one was asked."""
    judged = [record for record in records if "judge" in record]
    if not judged:
        return {}
    spoken = [record for record in judged if record["judge"]["verdict"] is not None]
    failures = [str(record["judge"]["error"]) for record in judged if record["judge"]["verdict"] is None]
    verdicts = Counter(record["judge"]["verdict"] for record in spoken)
    values = [float(record["judge"]["verdict"] == "correct") for record in spoken]
    agree = [judge_answer(record)[0] == value for record, value in zip(spoken, values, strict=True)]
    right, tried = verdicts["correct"], verdicts["correct"] + verdicts["incorrect"]
    failed = {"errors": len(failures)} | ({"first_error": failures[0]} if failures else {})
    return {
        "judge": _mean_by_question(spoken, values) | failed,
        "verdicts": dict(sorted(verdicts.items())),
        # SimpleQA's figures; its F-score is the harmonic mean of both shares of right answers.
        "judge_given_attempted": right / tried if tried else None,
        "judge_f_score": 2 * right / (len(spoken) + tried) if spoken else None,
        "judge_agrees_with_em": mean_of(agree) if agree else None,
    }


def _selective(records: Sequence[Record]) -> dict[str, Any]:
    """Accuracy of the answers that were given, and what the stated confidences are worth."""
    tried = [record for record in records if attempted(record)]
    found: dict[str, Any] = {
        "coverage": len(tried) / len(records),
        "abstained_rate": mean_of(bool(record.get("abstained")) for record in records),
        "accuracy_given_answered": _mean_by_question(tried, [verdict_of(record) for record in tried]),
    }
    sure = [record for record in tried if record.get("confidence") is not None]
    if sure:
        confidence = np.array([record["confidence"] for record in sure])
        right = np.array([verdict_of(record) for record in sure])
        found["calibration"] = {"n": len(sure), **calibration(confidence, right)}
    return found


def calibration(confidence: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """ECE, Brier score and AUC of stated confidences, AURC, and risk at some coverages."""
    coverage, risk = risk_coverage(confidence, right)
    at = {c: float(risk[min(np.searchsorted(coverage, c - 1e-9), len(risk) - 1)]) for c in _COVERAGES}
    return {
        "ece": expected_calibration_error(confidence, right),
        "brier": brier_score(confidence, right),
        "auc": auc(confidence, right),
        "aurc": float(risk.mean()),
        "risk_at_coverage": {str(c): value for c, value in at.items()},
    }


def _searching(records: Sequence[Record]) -> dict[str, Any]:
    """Evidence, novelty, and the share right within so many searches; of older records only the last."""
    searches = np.array([len(record["searches"]) for record in records])
    right = np.array([verdict_of(record) for record in records])
    found: dict[str, Any] = {
        "right_within_searches": {
            str(most): float(np.mean(right * (searches <= most))) for most in range(int(searches.max()) + 1)
        }
    }
    known = [record for record in records if record.get("evidence_recall") is not None]
    if known:
        found["evidence_recall"] = _mean_by_question(known, [record["evidence_recall"] for record in known])
        had = [each for record in known if (each := record["searches_after_evidence"]) is not None]
        found["searches_after_evidence"] = mean_of(had) if had else None
    if novelty := [each for record in records for each in record.get("novelty", ())]:
        found["novelty"] = mean_of(novelty)
    key = "searches_after_nothing_new"
    if in_vain := [record[key] for record in records if key in record]:
        found[key] = mean_of(in_vain)
    return found


def _cost(records: Sequence[Record]) -> dict[str, Any]:
    """Tokens and seconds a question, and all that was spent for each right answer."""
    if not all("tokens_in" in record for record in records):
        return {}
    spent = {name: sum(record[name] for record in records) for name in ("tokens_in", "tokens_out", "seconds")}
    spent["searches"] = sum(len(record["searches"]) for record in records)
    right = sum(verdict_of(record) for record in records)
    each = {f"{name}_per_question": spent[name] / len(records) for name in ("tokens_in", "seconds")}
    return each | {
        "cost_per_right_answer": {name: total / right for name, total in spent.items()} if right else None
    }


def _mean_by_question(records: Sequence[Record], values: Sequence[float]) -> dict[str, Any]:
    """The mean over questions, each the mean of its samples; None where there are none."""
    if not records:
        return {"mean": None, "low": None, "high": None}
    of: dict[str, list[float]] = defaultdict(list)
    first: dict[str, Record] = {}
    for record, value in zip(records, values, strict=True):
        of[question_of(record)].append(value)
        first.setdefault(question_of(record), record)
    means = np.array([[np.mean(each)] for each in of.values()])
    return estimate(means, clusters_of(list(first.values())))[0]


def _groups(
    records: Iterable[Record], key: Callable[[Record], str], ordered: bool = True
) -> dict[str, list[Record]]:
    """Records by their key: by number of hops where its name says it, then by name; or as they come."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        found[key(record)].append(record)
    hops = {"one_hop": 1, "two_hop": 2, "three_hop": 3}
    return dict(sorted(found.items(), key=lambda pair: (hops.get(pair[0], 9), pair[0]))) if ordered else found


def mean_of(values: Iterable[float]) -> float:
    """Their mean."""
    return float(np.mean([float(value) for value in values]))
