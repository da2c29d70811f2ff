"""Labelled searches -> training examples of a retriever, in the format of `data.examples`."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agent.query_styles import QUERY_STYLES
from agent.tools import SEARCH
from data.errors import ConfigError, DataError
from data.jsonl import write_jsonl
from data.records import Example, Question
from rl.co_training.labels import LABELLERS, Label, Labels, label
from rl.co_training.searches import Searched, Searches, read_searches

NEGATIVES = (Label.REDUNDANT, Label.HARD, Label.WEAK)
"""Labels that become negatives, in the order in which they are taken (ITER's tiers)."""
TIER_WEIGHTS = {Label.REDUNDANT: 3.0, Label.HARD: 1.0, Label.WEAK: 0.3}
"""Weight of a negative of each tier (ITER, 2608.27912)."""


@dataclass(frozen=True)
class LabelConfig:
    """Settings by which searches become examples."""

    labels: str = "answer"
    """Name of a labeller: gold, answer, quote or opened."""
    style: str = "query"
    """Text of an example's query: query, question or history."""
    negatives: int = 15
    """Most negatives of an example."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a name that no table has, or a negative number."""
        for name, table in (("labels", LABELLERS), ("style", QUERY_STYLES)):
            if (given := getattr(self, name)) not in table:
                raise ConfigError(f"{name} = {given!r}: must be one of {', '.join(table)}")
        if self.negatives < 0:
            raise ConfigError(f"negatives = {self.negatives}: must be >= 0")


@dataclass
class Tally:
    """Counts of what was read and made."""

    trajectories: int = 0
    searches: int = 0
    examples: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    """Searches and trajectories left out, by reason."""


@dataclass(frozen=True)
class _Asked:
    """One query of one question: labels united over the trajectories that asked it."""

    question: Question
    query: str
    labels: dict[str, Label]
    tokens: int
    """Longest reasoning that followed."""


def mine_trajectories(
    path: str | Path,
    out: str | Path,
    config: LabelConfig,
    held_out: Iterable[Question] = (),
    corpus_hash: str = "",
    progress: Callable[[Iterable[Searches]], Iterable[Searches]] = iter,
) -> Tally:
    """Write the examples that the searches of a trajectory file give; the same file gives the same bytes.

    A query asked twice of one question is one example. held_out: questions that must not contribute, by id
    or text. Raises DataError where the file is wrong, or gives no example.
    """
    tally = Tally()
    asked = _collect(progress(read_searches(path)), config, _Known(held_out), tally)
    examples = list(_examples(asked.values(), config, corpus_hash, Path(path).name, tally))
    if not examples:
        reasons = ", ".join(f"{count} {reason}" for reason, count in tally.dropped.most_common())
        raise DataError(
            f"{path}: {tally.trajectories} trajectories with {tally.searches} searches give no example"
            + (f" ({reasons})" if reasons else "")
        )
    write_jsonl(out, (example.as_record() for example in examples))
    return tally


class _Known:
    """Questions by id and by text, case and blanks aside."""

    def __init__(self, questions: Iterable[Question]) -> None:
        self._keys = {key for question in questions for key in self._of(question)}

    def __contains__(self, question: Question) -> bool:
        return not self._keys.isdisjoint(self._of(question))

    @staticmethod
    def _of(question: Question) -> tuple[str, str]:
        return f"id {question.id}", f"text {' '.join(question.text.lower().split())}"


def _collect(
    read: Iterable[Searches], config: LabelConfig, held_out: _Known, tally: Tally
) -> Mapping[tuple[str, str], _Asked]:
    found: dict[tuple[str, str], _Asked] = {}
    for searches in read:
        tally.trajectories += 1
        tally.searches += len(searches.calls)
        if searches.question in held_out:
            tally.dropped["searches of held-out questions"] += len(searches.calls)
            continue
        history: list[str] = []
        for call, labels in zip(searches.calls, label(searches, config.labels), strict=True):
            if call.tool != SEARCH.name:
                continue  # the argument names a page; no retriever is asked
            tally.labels.update(str(kind) for kind in labels.values())
            text = QUERY_STYLES[config.style](searches.question.text, history, call.query)
            key = (searches.question.id, text)
            found[key] = _united(found.get(key), searches.question, text, call, labels)
            history.append(call.query)
    return found


def _united(known: _Asked | None, question: Question, text: str, call: Searched, labels: Labels) -> _Asked:
    """Unite the labels of a query asked again: of two the one that stands first in `Label` counts."""
    order = list(Label)
    merged = dict(known.labels) if known else {}
    for id_, kind in labels.items():
        merged[id_] = min(kind, merged.get(id_, kind), key=order.index)
    tokens = max(call.next_tokens, known.tokens if known else 0)
    return _Asked(question, text, merged, tokens)


def _examples(
    asked: Iterable[_Asked], config: LabelConfig, corpus_hash: str, source: str, tally: Tally
) -> Iterator[Example]:
    kept = []
    for each in asked:
        if Label.POSITIVE not in each.labels.values():
            tally.dropped["queries without a positive"] += 1
        elif not each.query.strip():
            tally.dropped["empty queries"] += 1
        else:
            kept.append(each)
    weights = reasoning_weights([each.tokens for each in kept])
    for number, (each, weight) in enumerate(zip(kept, weights, strict=True)):
        by = {kind: [id_ for id_, of in each.labels.items() if of is kind] for kind in Label}
        negatives = [id_ for kind in NEGATIVES for id_ in by[kind]][: config.negatives]
        tally.examples += 1
        yield Example(
            query=each.query,
            positives=tuple(by[Label.POSITIVE]),
            negatives=tuple(negatives),
            query_id=f"{each.question.id}/{number}",
            answers=each.question.gold_answers,
            provenance={
                **({"corpus": corpus_hash} if corpus_hash else {}),
                "trajectories": source,
                "question_id": each.question.id,
                "labels": config.labels,
                "style": config.style,
                "tiers": {id_: str(each.labels[id_]) for id_ in negatives},
                "weight": round(weight, 6),
            },
        )


def reasoning_weights(tokens: Sequence[int]) -> list[float]:
    """Weight examples by the length of the reasoning after the search (LRAT, 2604.04949), mean 1.

    w = (1 - 2^(-l / b)) / mean, b the median length.   [10, 10] -> [1, 1]; all 0 -> all 1
    """
    middle = statistics.median(tokens) if tokens else 0
    raw = [1 - 2 ** (-length / middle) if middle else 1.0 for length in tokens]
    mean = sum(raw) / len(raw) if raw else 0
    return [value / mean if mean else 1.0 for value in raw]
