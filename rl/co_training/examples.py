"""Labelled searches -> training examples of a retriever, in the format of `data.examples`."""

from __future__ import annotations

import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from agent.query_styles import QUERY_STYLES
from agent.tools import SEARCH
from agent.transcripts import trajectory_file
from data.corpus import Corpus
from data.errors import ConfigError, DataError, require
from data.jsonl import write_jsonl
from data.records import Example, Question
from data.text import counted
from rl.co_training.labels import LABELLERS, SCORED, Label, Redundancy, label
from rl.co_training.searches import Searched, Searches, read_searches

NEGATIVES = (Label.REDUNDANT, Label.HARD, Label.WEAK)
"""Labels that become negatives, in the order in which they are taken (ITER's tiers)."""
TIER_WEIGHTS = {Label.REDUNDANT: 3.0, Label.HARD: 1.0, Label.WEAK: 0.3}
"""Weight of a negative of each tier (ITER, 2608.27912)."""


@dataclass(frozen=True)
class LabelConfig:
    """Settings by which searches become examples."""

    labels: str = "answer"
    """Name of a labeller."""
    style: str = "query"
    """Text of an example's query: query, question or history."""
    negatives: int = 15
    """Most negatives of an example."""
    least_negatives: int = 0
    """Queries with fewer are left out."""
    drawn: bool = False
    """Draw the negatives at random, the same ones for the same query; else by tier, as they were ranked."""
    most: Mapping[Label, int] = field(default_factory=dict)
    """Most negatives of a tier."""
    correct_only: bool = False
    """Read the trajectories alone whose answer is right."""
    redundancy: Redundancy = "shown"
    """See `label`."""
    weighted: tuple[str, ...] = ("reasoning", "tiers")
    """Weights: of an example by the reasoning that followed (LRAT), of a negative by its tier (ITER)."""

    def __post_init__(self) -> None:
        for name, table in (("labels", LABELLERS), ("style", QUERY_STYLES)):
            if (given := getattr(self, name)) not in table:
                raise ConfigError(f"{name} = {given!r}: must be one of {', '.join(table)}")
        require(self.negatives >= 0, "negatives", self.negatives, ">= 0")


RECIPES = {
    "agentic_r": LabelConfig(
        "agentic_r", "question", 15, least_negatives=15, drawn=True, redundancy="none", weighted=()
    ),
    "lrat": LabelConfig("opened", "query", 9, correct_only=True, redundancy="none", weighted=("reasoning",)),
    "iter": LabelConfig(
        "opened",
        "history",
        9,
        most={Label.REDUNDANT: 3, Label.HARD: 3},
        correct_only=True,
        redundancy="trajectory",
    ),
}
"""Published recipes (2601.11888, 2604.04949, 2608.27912)."""


class NoExamples(DataError):
    """No search of the file became an example."""


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
    group: str
    """Id of the question that this may be a sample of."""
    at: int
    """Place among the calls, the first where it was asked again."""
    query: str
    labels: dict[str, Label]
    ranks: dict[str, int]
    tokens: int
    """Longest reasoning that followed."""


def mine_trajectories(
    path: str | Path,
    out: str | Path,
    config: LabelConfig,
    held_out: Iterable[Question] = (),
    corpus: Corpus | None = None,
    progress: Callable[[Iterable[Searches]], Iterable[Searches]] = iter,
    scores: str | Path | None = None,
) -> Tally:
    """Write the examples that the searches of a trajectory file give; the same file gives the same bytes.

    scores: of `sleuth score-searches`, for the labellers in SCORED. held_out: questions that must not
    contribute, by id or text. corpus: the passages that were searched. A query asked twice of one question is
    one example. Raises DataError where the file is wrong or of another corpus, NoExamples for none.
    """
    if config.labels in SCORED and scores is None:
        raise ConfigError(f"labels = {config.labels}: needs scores, a file of `sleuth score-searches`")
    path, tally = trajectory_file(path), Tally()
    read = progress(read_searches(path, scores))
    read = _of_corpus(read, corpus) if corpus else read
    asked = _collect(read, config, _Known(held_out), tally)
    corpus_hash = corpus.content_hash if corpus else ""
    examples = list(_examples(asked.values(), config, corpus_hash, path.name, tally))
    if not examples:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in tally.dropped.most_common())
        read_of = f"{counted(tally.trajectories, 'trajectory')} with {counted(tally.searches, 'search')}"
        raise NoExamples(f"{path}: {read_of} give no example" + (f" ({reasons})" if reasons else ""))
    write_jsonl(out, (example.as_record() for example in examples))
    return tally


def _of_corpus(read: Iterable[Searches], corpus: Corpus) -> Iterator[Searches]:
    """Yield the searches; DataError for a passage that the corpus lacks, or has with another text."""
    for searches in read:
        calls = [call for call in searches.calls if call.tool == SEARCH.name]
        for shown in (passage for call in calls for passage in call.passages):
            there = corpus.get(shown.id)
            if there is None or there.contents != shown.contents:  # a server may send no title apart
                said = f"{'is not' if there is None else 'has another text'} in {corpus.path}: another corpus"
                raise DataError(f"{searches.place}: passage {shown.id!r} {said}")
        yield searches


class _Known:
    """Questions by id and by text, case and blanks aside."""

    def __init__(self, questions: Iterable[Question]) -> None:
        self._keys = {key for question in questions for key in self._of(question)}

    def __contains__(self, question: Question) -> bool:
        return not self._keys.isdisjoint(self._of(question))

    @staticmethod
    def _of(question: Question) -> tuple[str, str]:
        asked = question.metadata.get("sample_of", question.id)
        return f"id {asked}", f"text {' '.join(question.text.lower().split())}"


def _collect(
    read: Iterable[Searches], config: LabelConfig, held_out: _Known, tally: Tally
) -> Mapping[tuple[str, str, str], _Asked]:
    found: dict[tuple[str, str, str], _Asked] = {}
    for searches in read:
        tally.trajectories += 1
        tally.searches += len(searches.calls)
        if searches.question in held_out:
            tally.dropped["searches of held-out questions"] += len(searches.calls)
            continue
        if config.correct_only and not searches.is_correct:
            tally.dropped["searches of trajectories with a wrong answer"] += len(searches.calls)
            continue
        history: list[str] = []
        labelled = label(searches, config.labels, config.redundancy)
        for at, (call, labels) in enumerate(zip(searches.calls, labelled, strict=True)):
            if call.tool != SEARCH.name:
                continue  # the argument names a page; no retriever is asked
            tally.labels.update(str(kind) for kind in labels.values())
            text = QUERY_STYLES[config.style](searches.question.text, history, call.query)
            history.append(call.query)
            if not call.query.strip():
                tally.dropped["empty queries"] += 1
                continue
            key = (searches.group, searches.question.text, text)
            ranks = {id_: rank for rank, id_ in enumerate(labels)}
            tokens = _reasoning(searches.calls, at)
            new = _Asked(searches.question, searches.group, at, text, dict(labels), ranks, tokens)
            found[key] = _united(found[key], new) if key in found else new
    return found


def _reasoning(calls: Sequence[Searched], at: int) -> int:
    """Count the tokens that follow a search: the longest turn after a page that it led to, else the next."""
    pages = [call.next_tokens for call in takewhile(lambda c: c.tool != SEARCH.name, calls[at + 1 :])]
    return max(pages, default=calls[at].next_tokens)


def _united(known: _Asked, new: _Asked) -> _Asked:
    """Unite the labels of a query asked again: of two the one that stands first in `Label` counts.

    The same whichever is known first, as trajectories stand in the order in which they finished.
    """
    order, labels, ranks = list(Label), {**known.labels}, {**known.ranks}
    for id_, kind in new.labels.items():
        labels[id_] = min(kind, labels.get(id_, kind), key=order.index)
        ranks[id_] = min(new.ranks[id_], ranks.get(id_, new.ranks[id_]))
    labels = dict(sorted(labels.items(), key=lambda each: (ranks[each[0]], each[0])))
    at, tokens = min(known.at, new.at), max(known.tokens, new.tokens)
    return replace(known, at=at, labels=labels, ranks=ranks, tokens=tokens)


def _examples(
    asked: Collection[_Asked], config: LabelConfig, corpus_hash: str, source: str, tally: Tally
) -> Iterator[Example]:
    kept = []
    useful: dict[str, set[str]] = defaultdict(set)
    for each in asked:
        useful[each.question.text].update(i for i, kind in each.labels.items() if kind is Label.POSITIVE)
    for each in sorted(asked, key=lambda each: (each.group, each.at, each.query, each.question.text)):
        if Label.POSITIVE not in each.labels.values():
            tally.dropped["queries without a positive"] += 1
        else:
            kept.append(each)
    by_reasoning = reasoning_weights([each.tokens for each in kept])
    for number, (each, weight) in enumerate(zip(kept, by_reasoning, strict=True)):
        negatives = _negatives(each, config, useful[each.question.text])
        if len(negatives) < config.least_negatives:
            tally.dropped[f"queries with fewer than {config.least_negatives} negatives"] += 1
            continue
        tally.examples += 1
        weights: dict[str, Any] = {"weight": round(weight, 6)} if "reasoning" in config.weighted else {}
        if "tiers" in config.weighted:
            weights["negative_weights"] = {id_: TIER_WEIGHTS[each.labels[id_]] for id_ in negatives}
        yield Example(
            query=each.query,
            positives=tuple(id_ for id_, kind in each.labels.items() if kind is Label.POSITIVE),
            negatives=tuple(negatives),
            query_id=f"{each.group}/{number}",
            answers=each.question.gold_answers,
            provenance={
                **({"corpus": corpus_hash} if corpus_hash else {}),
                "trajectories": source,
                "question_id": each.group,
                "labels": config.labels,
                "style": config.style,
                "tiers": {id_: str(each.labels[id_]) for id_ in negatives},
                **weights,
            },
        )


def _negatives(asked: _Asked, config: LabelConfig, useful: set[str]) -> list[str]:
    """The negatives of a query; no one that is useful to another query of its question, unless redundant."""
    by = {kind: [id_ for id_, of in asked.labels.items() if of is kind] for kind in NEGATIVES}
    found = [
        id_
        for kind, ids in by.items()
        for id_ in [i for i in ids if kind is Label.REDUNDANT or i not in useful][: config.most.get(kind)]
    ]
    if config.drawn and len(found) > config.negatives:
        return random.Random(asked.query).sample(found, config.negatives)
    return found[: config.negatives]


def reasoning_weights(tokens: Sequence[int]) -> list[float]:
    """Weight examples by the length of the reasoning after the search (LRAT, 2604.04949), mean 1.

    w = (1 - 2^(-l / b)) / mean, b the median length.   [10, 10] -> [1, 1]; all 0 -> all 1
    """
    middle = statistics.median(tokens) if tokens else 0
    raw = [1 - 2 ** (-length / middle) if middle else 1.0 for length in tokens]
    mean = sum(raw) / len(raw) if raw else 0
    return [value / mean if mean else 1.0 for value in raw]
