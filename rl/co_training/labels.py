"""Labels of the passages that a search showed: pure functions of the searches of one trajectory.

The same file gives the same labels. Label once, render queries afterwards (ITER, 2608.27912).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Literal

from agent.tools import OPEN_PAGE, SEARCH
from data.metrics.answers import cover_em, normalize_unicode
from data.records import Passage
from rl.algorithm.rewards import gold_passages
from rl.co_training.searches import Searched, Searches


class Label(StrEnum):
    """Kind of a passage for the query that found it."""

    POSITIVE = "positive"
    """Useful, and first found by this search."""
    REDUNDANT = "redundant"
    """Useful, but an earlier search had shown it already."""
    HARD = "hard"
    """Read or known, and useless."""
    WEAK = "weak"
    """Shown, and nothing speaks for it."""
    UNKNOWN = "unknown"
    """No evidence either way: neither positive nor negative."""


Labels = Mapping[str, Label]
"""Label of each passage id of one search."""
Judgement = dict[str, Label]
Labeller = Callable[[Searches], list[Judgement]]
"""Judge the passages of each call of a trajectory as POSITIVE (useful), HARD, WEAK or UNKNOWN."""

Redundancy = Literal["none", "shown", "trajectory"]
QUOTE_WORDS = 4
"""Shortest span of words that counts as a quote."""
USEFUL_SCORE = 60
"""Least score of a judge for a passage that is useful (Agentic-R), of 100."""
MOST_TIES = 3
"""Most positives of a search by Agentic-R's rule."""


def label(searches: Searches, labeller: str, redundancy: Redundancy = "shown") -> list[Labels]:
    """Return the labels of each call by the labeller of that name in LABELLERS.

    One that is useful anywhere in the trajectory is never a negative before it is found, so what is read
    later is known before (ITER). A useful passage becomes REDUNDANT where redundancy is
    shown        an earlier search had shown it (had it opened, if that is what makes it useful)
    trajectory   also in later searches that do not show it; and what was HARD stays so there (ITER)
    none         never (LRAT)
    """
    judged = LABELLERS[labeller](searches)
    useful = {id_ for call in judged for id_, kind in call.items() if kind is Label.POSITIVE}
    shown: set[str] = set()
    read: Judgement = {}
    labelled: list[Labels] = []
    for call, seen in zip(judged, searches.calls, strict=True):
        known = read if redundancy == "trajectory" else {}
        found = {id_: kind for id_, kind in known.items() if id_ not in call}
        for id_, kind in call.items():
            if kind is Label.POSITIVE and redundancy != "none" and id_ in shown:
                kind = Label.REDUNDANT
            elif kind is not Label.POSITIVE and id_ in known:
                kind = known[id_]
            elif kind in (Label.HARD, Label.WEAK) and id_ in useful:
                kind = Label.UNKNOWN
            found[id_] = kind
        labelled.append(found)
        now = {p.id: call.get(p.id) for p in seen.passages}  # scores also judge what was not shown
        hard = [id_ for id_, kind in now.items() if kind is Label.HARD and id_ not in useful]
        helped = [id_ for id_, kind in now.items() if kind is Label.POSITIVE]
        read |= dict.fromkeys(hard, Label.HARD) | dict.fromkeys(helped, Label.REDUNDANT)
        shown |= set(helped if labeller == "opened" else now)
    return labelled


def gold(searches: Searches) -> list[Judgement]:
    """Label by the question's own gold passages; UNKNOWN throughout where it names none."""
    names, field = gold_passages(searches.question)

    def kind(passage: Passage) -> Label:
        return Label.POSITIVE if getattr(passage, field) in names else Label.HARD

    return [
        {p.id: kind(p) if names and call.tool == SEARCH.name else Label.UNKNOWN for p in call.passages}
        for call in searches.calls
    ]


def answer(searches: Searches) -> list[Judgement]:
    """Label by a gold answer that stands in a passage of a correct trajectory.

    Where one passage of a search holds it the others are WEAK. A search that shows none stays UNKNOWN: what
    leads to another search holds no answer either. An answer that the question names, as one of two to
    choose from, is no evidence: it stands in any passage about it.
    """
    question = searches.question

    def named(text: str) -> bool:
        return cover_em(text, question.gold_answers, question.normalizer) == 1.0

    tells = searches.is_correct and not named(question.text)
    found = [[tells and named(p.contents) for p in call.passages] for call in searches.calls]
    return [_by_use(call, useful) for call, useful in zip(searches.calls, found, strict=True)]


def quote(searches: Searches) -> list[Judgement]:
    """Label by whether the policy's next turn repeats QUOTE_WORDS words of a passage in their order.

    Words of the query and of the question do not count: to repeat these is no reading.
    """
    asked = normalize_unicode(searches.question.text)
    return [
        _by_use(
            call,
            [_quotes(call.next_text, p, f"{asked} {normalize_unicode(call.query)}") for p in call.passages],
        )
        for call in searches.calls
    ]


def opened(searches: Searches) -> list[Judgement]:
    """Label by what `open_page` was asked for after a search, before the next one (LRAT, 2604.04949).

    One that a judge of the reading (score `read`) found useless is HARD, one that is opened after another
    search is no negative. Nothing opened leaves a search UNKNOWN.
    """
    asked = [
        set(opened_pages(searches.calls, at)) if call.tool == SEARCH.name else set()
        for at, call in enumerate(searches.calls)
    ]
    anywhere = set[str]().union(*asked)

    def kind(call: Searched, id_: str, pages: set[str]) -> Label:
        if id_ in pages:
            useless = call.scores.get(id_, {}).get("read", 100.0) < USEFUL_SCORE
            return Label.HARD if useless else Label.POSITIVE
        return Label.UNKNOWN if id_ in anywhere or not pages else Label.WEAK

    return [
        {p.id: kind(call, p.id, pages) for p in call.passages}
        for call, pages in zip(searches.calls, asked, strict=True)
    ]


def by_score(name: str, least: float, other: Label = Label.WEAK) -> Labeller:
    """Return the labeller by a score: useful from `least` on, the others `other` where one is useful.

    With `other` HARD they are so in any case. What has no score stays UNKNOWN.
    """

    def judge(call: Searched) -> Judgement:
        scores = {id_: scored[name] for id_, scored in call.scores.items() if name in scored}
        useful = {id_ for id_, score in scores.items() if score >= least}
        below = other if useful or other is Label.HARD else Label.UNKNOWN
        unknown = {p.id: Label.UNKNOWN for p in call.passages}
        return unknown | {id_: Label.POSITIVE if id_ in useful else below for id_ in scores}

    return lambda searches: [judge(call) for call in searches.calls]


def agentic_r(searches: Searches) -> list[Judgement]:
    """Label candidates by whether the answer came out right with each alone, then by a judge's score.

    The best and its ties, at most MOST_TIES, are useful where the answer is right and the judge gives
    USEFUL_SCORE; other ties are UNKNOWN, the rest HARD (Agentic-R, 2601.11888).
    """

    def judge(call: Searched) -> Judgement:
        scores = {i: (s["alone"], s["judge"]) for i, s in call.scores.items() if {"alone", "judge"} <= set(s)}
        best = max(scores.values(), default=(0.0, 0.0))
        if best < (1.0, USEFUL_SCORE):
            return {p.id: Label.UNKNOWN for p in call.passages}
        ties = [id_ for id_, score in scores.items() if score == best]
        found = dict.fromkeys(scores, Label.HARD) | dict.fromkeys(ties, Label.UNKNOWN)
        return found | dict.fromkeys(ties[:MOST_TIES], Label.POSITIVE)

    return [judge(call) for call in searches.calls]


LABELLERS: dict[str, Labeller] = {
    "gold": gold,
    "answer": answer,
    "quote": quote,
    "opened": opened,
    "judge": by_score("judge", USEFUL_SCORE, Label.HARD),
    "fork": by_score("fork", 1e-9),
    "likelihood": by_score("likelihood", math.log(2)),
    "agentic_r": agentic_r,
}
SCORED = {name: (name,) for name in ("judge", "fork", "likelihood")} | {"agentic_r": ("alone", "judge")}
"""Labellers that need a file of scores, and the scores they read."""


def _by_use(call: Searched, useful: Sequence[bool]) -> Judgement:
    other = Label.WEAK if any(useful) else Label.UNKNOWN
    return {p.id: Label.POSITIVE if use else other for p, use in zip(call.passages, useful, strict=True)}


def opened_pages(calls: Sequence[Searched], at: int) -> dict[str, Searched]:
    """The pages opened before the next search, asked for by id or by number in this one, with their calls."""
    shown, pages = calls[at].passages, dict[str, Searched]()
    for call in calls[at + 1 :]:
        if call.tool != OPEN_PAGE.name:
            break
        number = int(call.query) if call.query.isascii() and call.query.isdecimal() else 0
        pages[shown[number - 1].id if 0 < number <= len(shown) else call.query] = call
    return pages


def _quotes(text: str, passage: Passage, asked: str) -> bool:
    spans = _spans(normalize_unicode(re.sub(r"<[^<>]*>", " ", text)))
    return bool(spans & _spans(normalize_unicode(passage.contents)) - _spans(asked))


def _spans(words: str) -> set[tuple[str, ...]]:
    split = words.split()
    return {tuple(split[at : at + QUOTE_WORDS]) for at in range(len(split) - QUOTE_WORDS + 1)}
