"""Questions that a corpus can answer: one of their gold answers stands, as it is, in a passage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.jsonl import write_json, write_jsonl
from data.metrics.answers import NORMALIZERS, words_of
from data.metrics.significance import estimate, format_estimate
from data.records import FORMAT_VERSION, Passage, Question

_CLOSED = {("yes",), ("no",)}
Lookup = dict[str, dict[tuple[str, ...], set[str]]]
"""Answers by their first word, with the ids of the questions that have them."""


def answerable(questions: Sequence[Question], passages: Iterable[Passage]) -> set[str]:
    """The ids of the questions whose answer stands in title or text of a passage, as `cover_em` compares.

    One pass over the passages, whatever the number of questions.
    """
    lookups: dict[str, Lookup] = defaultdict(dict)
    for question in questions:
        for gold in question.gold_answers:
            if words := words_of(gold, NORMALIZERS[question.normalizer]):
                answers = lookups[question.normalizer].setdefault(words[0], {})
                answers.setdefault(tuple(words), set()).add(question.id)
    found: set[str] = set()
    for passage in passages:
        for name, lookup in lookups.items():
            found.update(_found_in(words_of(f"{passage.title} {passage.text}", NORMALIZERS[name]), lookup))
    return found


def _found_in(words: Sequence[str], lookup: Lookup) -> Iterator[str]:
    for place, word in enumerate(words):
        for answer, ids in lookup.get(word, {}).items():
            if tuple(words[place : place + len(answer)]) == answer:
                yield from ids


def is_closed(question: Question) -> bool:
    """Return whether its answer is yes or no, which a corpus holds or not whatever is asked."""
    normalize = NORMALIZERS[question.normalizer]
    return all(tuple(words_of(gold, normalize)) in _CLOSED for gold in question.gold_answers)


def audit(questions: Sequence[Question], found: set[str]) -> dict[str, Any]:
    """Shares of answerable questions with intervals over clusters: overall, `by_set` and `by_kind`."""
    if not questions:
        raise DataError("nothing to audit: 0 questions")
    groups: dict[str, dict[str, list[Question]]] = {"by_set": {}, "by_kind": {}}
    for question in questions:
        for group, key in (("by_set", "data_source"), ("by_kind", "kind")):
            groups[group].setdefault(str(question.metadata.get(key, "all")), []).append(question)
    return {
        "format_version": FORMAT_VERSION,
        **_share(questions, found),
        **{
            group: {name: _share(of, found) for name, of in sorted(by.items())}
            for group, by in groups.items()
        },
    }


def _share(questions: Sequence[Question], found: set[str]) -> dict[str, Any]:
    opened = [question for question in questions if not is_closed(question)]
    counts = {"n": len(questions), "yes_no": len(questions) - len(opened)}
    if not opened:
        return counts | {"answerable": {"mean": None, "low": None, "high": None}}
    values = np.array([[question.id in found] for question in opened], dtype=float)
    clusters = [str(question.metadata.get("cluster", f"id:{question.id}")) for question in opened]
    return counts | {"answerable": estimate(values, clusters)[0]}


def show_rows(audited: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of its table."""
    parts = [("all", audited)]
    for group in ("by_set", "by_kind"):
        parts += audited[group].items() if len(audited[group]) > 1 else ()
    rows = []
    for name, row in parts:
        share = row["answerable"]
        shown = "–" if share["mean"] is None else format_estimate(share)
        rows.append((name, str(row["n"]), shown, str(row["yes_no"])))
    return ("questions", "n", "answerable [95 %]", "yes or no"), rows


def write_audit(
    out: Path, questions: Sequence[Question], found: set[str], audited: Mapping[str, Any]
) -> None:
    """Write the questions that are answerable (yes and no with them), those that are not, and audit.json."""
    kept = {question.id for question in questions if question.id in found or is_closed(question)}
    for name, wanted in (("answerable", True), ("unanswerable", False)):
        rows = (question.as_record() for question in questions if (question.id in kept) is wanted)
        write_jsonl(out / f"{name}.jsonl", rows)
    write_json(out / "audit.json", audited)
