"""Labels of the passages that a search showed: pure functions of the searches of one trajectory.

The same file gives the same labels. Label once, render queries afterwards (ITER, 2608.27912).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum

from agent.tools import OPEN_PAGE, SEARCH
from data.answers import cover_em, normalize_unicode
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

QUOTE_WORDS = 4
"""Shortest span of words that counts as a quote."""


def label(searches: Searches, labeller: str) -> list[Labels]:
    """Return the labels of each call by the labeller of that name in LABELLERS.

    A useful passage that an earlier search had shown is REDUNDANT. One that is useful anywhere in the
    trajectory is never a negative elsewhere, so what is read later is known before (ITER).
    """
    judged = LABELLERS[labeller](searches)
    useful = {id_ for call in judged for id_, kind in call.items() if kind is Label.POSITIVE}
    shown: set[str] = set()
    labelled: list[Labels] = []
    for call in judged:
        found: Judgement = {}
        for id_, kind in call.items():
            if kind is Label.POSITIVE and id_ in shown:
                kind = Label.REDUNDANT
            elif kind in (Label.HARD, Label.WEAK) and id_ in useful:
                kind = Label.UNKNOWN
            found[id_] = kind
        labelled.append(found)
        shown |= set(call)
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
    leads to another search holds no answer either.
    """
    question = searches.question

    def holds(passage: Passage) -> bool:
        return cover_em(passage.contents, question.gold_answers, question.normalizer) == 1.0

    found = [[searches.is_correct and holds(p) for p in call.passages] for call in searches.calls]
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

    Nothing opened leaves a search UNKNOWN.
    """
    asked = [_opened_after(searches.calls, at) for at in range(len(searches.calls))]
    return [
        _by_use(call, [call.tool == SEARCH.name and p.id in pages for p in call.passages])
        for call, pages in zip(searches.calls, asked, strict=True)
    ]


LABELLERS: dict[str, Labeller] = {"gold": gold, "answer": answer, "quote": quote, "opened": opened}


def _by_use(call: Searched, useful: Sequence[bool]) -> Judgement:
    other = Label.WEAK if any(useful) else Label.UNKNOWN
    return {p.id: Label.POSITIVE if use else other for p, use in zip(call.passages, useful, strict=True)}


def _opened_after(calls: Sequence[Searched], at: int) -> set[str]:
    """Ids of the passages opened before the next search: asked for by id, or by number in this search."""
    shown, pages = calls[at].passages, set[str]()
    for call in calls[at + 1 :]:
        if call.tool != OPEN_PAGE.name:
            break
        number = int(call.query) if call.query.isascii() and call.query.isdecimal() else 0
        pages.add(shown[number - 1].id if 0 < number <= len(shown) else call.query)
    return pages


def _quotes(text: str, passage: Passage, asked: str) -> bool:
    spans = _spans(normalize_unicode(re.sub(r"<[^<>]*>", " ", text)))
    return bool(spans & _spans(normalize_unicode(passage.contents)) - _spans(asked))


def _spans(words: str) -> set[tuple[str, ...]]:
    split = words.split()
    return {tuple(split[at : at + QUOTE_WORDS]) for at in range(len(split) - QUOTE_WORDS + 1)}
