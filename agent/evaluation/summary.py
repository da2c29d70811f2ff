"""Scores in words: the lines of a run's table, for the terminal, the report and Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from data.metrics.answers import METRICS
from data.metrics.significance import format_estimate

Scores = Mapping[str, Any]
_IN_TABLE = ("f1", "cover_em")


def describe(scores: Scores) -> list[tuple[str, str]]:
    """(name, value) of what a run measured besides EM, F1 and searches; what it does not have is left out."""
    others = [name for name in METRICS if name in scores and name not in ("em", *_IN_TABLE)]
    return [*((name, format_estimate(scores[name])) for name in others), *_lines(scores)]


def _lines(scores: Scores) -> Iterator[tuple[str, str]]:
    for name, key in (
        ("judge", "judge"),
        ("evidence recall", "evidence_recall"),
        ("accuracy given an answer", "accuracy_given_answered"),
        ("EM, mean over sets", "macro_em"),
    ):
        if (found := scores.get(key)) and found["mean"] is not None:
            missing = f", {found['errors']:,} not judged" if found.get("errors") else ""
            yield name, format_estimate(found) + missing
    if official := scores.get("official"):
        yield f"official metric: {official['metric']}", format_estimate(official)
    for k, found in scores.get("pass", {}).items():
        yield f"pass@{k}", format_estimate(found)
    for name, key, form in (
        ("answered", "coverage", "{:.3f}"),
        ('said "I don\'t know"', "abstained_rate", "{:.3f}"),
        ("novelty of a search", "novelty", "{:.2f}"),
        ("searches after the evidence was in", "searches_after_evidence", "{:.2f}"),
        ("searches after two found nothing new", "searches_after_nothing_new", "{:.2f}"),
        ("judged right, given an attempt", "judge_given_attempted", "{:.3f}"),
        ("F-score of SimpleQA", "judge_f_score", "{:.3f}"),
        ("tokens read a question", "tokens_in_per_question", "{:,.0f}"),
        ("tokens written a question", "policy_tokens_per_question", "{:,.0f}"),
        ("seconds a question", "seconds_per_question", "{:.2f}"),
    ):
        if scores.get(key) is not None:
            yield name, form.format(scores[key])
    if found := scores.get("calibration"):
        shown = (
            f"{key.upper()} {found[key]:.3f}"
            for key in ("ece", "brier", "auc", "aurc")
            if found[key] is not None
        )
        yield f"confidence ({found['n']:,} answers)", ", ".join(shown)
    if found := scores.get("cost_per_right_answer"):
        spent = ", ".join(f"{value:,.1f} {name.replace('_', ' ')}" for name, value in found.items())
        yield "cost of a right answer", spent
    if len(found := scores.get("right_within_searches", {})) > 1:
        yield "right within 0, 1, ... searches", "  ".join(f"{value:.3f}" for value in found.values())


def table(scores: Scores) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of the main table: over all questions, by set, by kind."""
    columns = ("questions", "n", "EM [95 %]", "F1", "cover EM", "searches", "valid format")
    parts = [("all", scores)]
    for group in ("by_set", "by_kind"):
        found = scores.get(group, {})
        parts += found.items() if len(found) > 1 else ()
    rows = [
        (
            name,
            str(row["n"]),
            format_estimate(row["em"]),
            *(f"{row[metric]['mean']:.3f}" for metric in _IN_TABLE),
            f"{row['searches_per_question']:.2f}",
            f"{row['valid_format_rate']:.3f}",
        )
        for name, row in parts
    ]
    return columns, rows
