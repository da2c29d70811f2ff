"""The gate of a round: a new retriever is taken only where it finds more of what the policy looks for.

What counts as found does not depend on what the old retriever showed: the question's gold passages where it
names them, else any passage with a gold answer in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agent.query_styles import QUERY_STYLES
from agent.tools import SEARCH
from data.errors import DataError
from data.metrics.answers import cover_em
from data.metrics.significance import estimate
from data.records import Passage, Question
from retriever_server.retriever import Retriever
from rl.algorithm.rewards import gold_passages
from rl.co_training.searches import read_searches

_TOGETHER = 256


@dataclass(frozen=True)
class Asked:
    """A query, the question it is for, and what earlier searches had asked and shown."""

    query: str
    question: Question
    shown: tuple[Passage, ...] = ()
    history: tuple[str, ...] | None = None
    """None: not a search but the question itself, asked as it stands."""

    def text(self, style: str | None) -> str:
        """Return what a retriever of that style is asked."""
        if self.history is None:
            return self.query
        return QUERY_STYLES[style or "query"](self.question.text, self.history, self.query)

    @property
    def is_open(self) -> bool:
        """Return whether something is left to find: a gold passage that was not shown yet, or the answer."""
        gold, field = gold_passages(self.question)
        return bool(self.question.gold_answers) and (not gold or bool(gold - self._names(field)))

    def finds(self, passage: Passage) -> bool:
        """Return whether this passage is one of those that are left to find."""
        gold, field = gold_passages(self.question)
        if gold:
            return getattr(passage, field) in gold - self._names(field)
        return cover_em(passage.contents, self.question.gold_answers, self.question.normalizer) == 1.0

    def _names(self, field: str) -> set[str]:
        return {getattr(passage, field) for passage in self.shown}


@dataclass(frozen=True)
class Decision:
    """The verdict of a gate, and the figures behind it. Estimates are {"mean", "low", "high"}."""

    passed: bool
    reason: str
    k: int
    searches: int
    old_found: float
    """Share of the searches for which the old retriever finds something useful among the first k."""
    new_found: float
    gain: dict[str, Any]
    """The new retriever's share less the old one's, on the policy's own searches."""
    plain: dict[str, Any] | None
    """The same where the questions themselves are asked; None without questions."""

    def as_record(self) -> dict[str, Any]:
        return asdict(self)


def read_asked(path: str | Path) -> Iterator[Asked]:
    """Yield the searches of a trajectory file that had something left to find."""
    for searches in read_searches(path):
        history: tuple[str, ...] = ()
        shown: tuple[Passage, ...] = ()
        for call in searches.calls:
            if call.tool == SEARCH.name:
                asked = Asked(call.query, searches.question, shown, history)
                if call.query.strip() and asked.is_open:
                    yield asked
                history += (call.query,)
            shown += call.passages


def judge_retrievers(
    searches: Sequence[Asked],
    questions: Sequence[Question],
    old: Retriever,
    new: Retriever,
    k: int = 3,
    max_plain_loss: float = 0.01,
) -> Decision:
    """Compare two retrievers on held-out searches of the present policy, and on plain questions.

    Each is asked in the style that it was trained in.
    Passes where the interval of the gain lies above 0 and plain retrieval loses at most `max_plain_loss`.
    Intervals resample clusters of questions. Raises DataError without a search.
    """
    if not searches:
        raise DataError("the gate has no held-out search to judge by")
    before, after, gain = _compare(searches, old, new, k)
    plain_asked = [asked for question in questions if (asked := Asked(question.text, question)).is_open]
    plain = _compare(plain_asked, old, new, k)[2] if plain_asked else None
    reason = _refusal(gain, plain, max_plain_loss)
    return Decision(not reason, reason or "finds more", k, len(searches), before, after, gain, plain)


def _refusal(gain: dict[str, Any], plain: dict[str, Any] | None, max_plain_loss: float) -> str:
    if gain["low"] is None:
        return "one question alone says nothing about others"
    if gain["low"] <= 0:
        return f"the gain's interval reaches {gain['low']:+.3f}: not above 0"
    if plain and plain["mean"] < -max_plain_loss:
        return f"plain questions lose {-plain['mean']:.3f}, allowed is {max_plain_loss}"
    return ""


def _compare(
    asked: Sequence[Asked], old: Retriever, new: Retriever, k: int
) -> tuple[float, float, dict[str, Any]]:
    before, after = (_found(retriever, asked, k) for retriever in (old, new))
    clusters = [str(each.question.metadata.get("cluster", each.question.id)) for each in asked]
    return float(before.mean()), float(after.mean()), estimate((after - before)[:, None], clusters)[0]


def _found(retriever: Retriever, asked: Sequence[Asked], k: int) -> np.ndarray:
    """1 where something useful is among the first k passages, else 0 (N,)."""
    found: list[float] = []
    style = retriever.query_style()
    for start in range(0, len(asked), _TOGETHER):
        part = asked[start : start + _TOGETHER]
        for each, hits in zip(part, retriever.search([a.text(style) for a in part], k), strict=True):
            found.append(float(any(each.finds(hit.passage) for hit in hits)))
    return np.array(found)
