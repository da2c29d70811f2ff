"""Chooses the questions whose trajectories a page holds: those asked for, or a fair sample of them."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from agent.evaluation.records import verdict_of
from data.errors import ConfigError, require
from data.text import counted

if TYPE_CHECKING:
    from agent.evaluation.report.folders import Evaluation, Run

Verdict = Literal["all", "right", "wrong", "fixed", "broken"]

_VERDICTS: dict[str, Callable[[bool | None, bool | None], bool]] = {
    "all": lambda first, last: True,
    "right": lambda first, last: last is True,
    "wrong": lambda first, last: last is False,
    "fixed": lambda first, last: first is False and last is True,
    "broken": lambda first, last: first is True and last is False,
}


@dataclass(frozen=True)
class Choice:
    """The part of a folder that goes into its page."""

    evaluations: str | None = None
    """Names or patterns of evaluations, with commas between; see `folders.read_folder`."""
    verdict: Verdict = "all"
    """Verdict in the evaluation `after`, else the last one shown; fixed and broken compare with the first."""
    kind: str | None = None
    questions: tuple[str, ...] = ()
    megabytes: float = 5.5

    def __post_init__(self) -> None:
        require(self.megabytes > 0, "megabytes", self.megabytes, "> 0")


def choose(run: Run, choice: Choice) -> list[str]:
    """The ids that are asked for, in such an order that the first n, whatever n, are a fair sample of them.

    Every kind of question and every pattern of verdicts has its share, and one question at least as soon as
    there is room for all. Which ones depends on the ids alone.
    """
    kinds = {kind_of(run, id_) for id_ in every_question(run)}
    allowed = f"one of {', '.join(sorted(kinds))}" if kinds else "left out: there are no questions"
    require(choice.kind in (None, *kinds), "kind", choice.kind, allowed)
    asked = [id_ for id_ in every_question(run) if _is_wanted(run, id_, choice)]
    missing = set(choice.questions) - set(asked)
    if missing:
        raise ConfigError(f"questions: {min(missing)!r} is not among those that are asked for")
    if not asked and choice.verdict != "all":
        of_kind = [id_ for id_ in every_question(run) if choice.kind in (None, kind_of(run, id_))]
        others = [verdict for verdict in _VERDICTS if verdict != "all"]
        counts = (f"{sum(_has(run, id_, each) for id_ in of_kind):,} {each}" for each in others)
        kind = f", kind = {choice.kind}" if choice.kind else ""
        raise ConfigError(
            f"verdict = {choice.verdict}{kind}: no such question; there are {', '.join(counts)}"
        )
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for id_ in asked:
        groups[(kind_of(run, id_), *(_is_right(e, id_) for e in run.evaluations))].append(id_)
    places: dict[str, float] = {}
    for members in groups.values():
        for place, id_ in enumerate(sorted(members, key=_shuffled)):
            places[id_] = (place + 0.5) / len(members) if place else 0.0
    return sorted(asked, key=lambda id_: (places[id_], _shuffled(id_)))


def every_question(run: Run) -> list[str]:
    """The ids of all evaluations, in the order in which they stand there."""
    return list(dict.fromkeys(id_ for evaluation in run.evaluations for id_ in evaluation.records))


def kind_of(run: Run, id_: str) -> str:
    """The kind of a question, `all` where it has none."""
    record = next(e.records[id_] for e in run.evaluations if id_ in e.records)
    return str(record["metadata"].get("kind", "all"))


def describe(run: Run, choice: Choice, kept: int, asked: int) -> str:
    """Say in a sentence which trajectories the page holds; empty where it holds them all."""
    parts = []
    total = len(every_question(run))
    if asked < total:
        parts.append(f"{asked:,} of {total:,} questions are those asked for")
    if kept < asked:
        parts.append(
            f"{kept:,} of {asked:,} questions are shown, a sample in which every kind and every outcome has "
            "its share; --verdict, --kind or --questions choose others, --megabytes makes a larger page"
        )
    if run.passed_over and choice.evaluations is None:
        some = ", ".join(run.passed_over[:3]) + (", ..." if len(run.passed_over) > 3 else "")
        parts.append(
            f"of the evaluations on dev the first, the best and the last are shown; --evaluations '*' adds "
            f"{counted(len(run.passed_over), 'other')} ({some})"
        )
    return "; ".join(parts)


def _has(run: Run, id_: str, verdict: str) -> bool:
    named = {evaluation.name: evaluation for evaluation in run.evaluations}
    last = named.get("after", run.evaluations[-1])
    return _VERDICTS[verdict](_is_right(run.evaluations[0], id_), _is_right(last, id_))


def _is_right(evaluation: Evaluation, id_: str) -> bool | None:
    record = evaluation.records.get(id_)
    return None if record is None else verdict_of(record) > 0


def _is_wanted(run: Run, id_: str, choice: Choice) -> bool:
    return (
        _has(run, id_, choice.verdict)
        and choice.kind in (None, kind_of(run, id_))
        and (not choice.questions or id_ in choice.questions)
    )


def _shuffled(id_: str) -> bytes:
    return hashlib.sha256(id_.encode(errors="surrogatepass")).digest()
