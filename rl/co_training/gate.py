"""The gate of a round: a new retriever is taken only where it finds more of what the policy looks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data.errors import DataError
from data.records import Example, Question
from data.significance import estimate
from retriever_server.retriever import Retriever
from rl.algorithm.rewards import gold_passages

_TOGETHER = 256


@dataclass(frozen=True)
class Decision:
    """What the gate saw, and whether the new retriever may serve. Estimates are {"mean", "low", "high"}."""

    passed: bool
    reason: str
    k: int
    searches: int
    old_recall: float
    new_recall: float
    gain: dict[str, Any]
    """Recall of the new retriever less that of the old, on the policy's own searches."""
    plain: dict[str, Any] | None
    """The same where the questions themselves are asked; None without questions that name their passages."""

    def as_record(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def judge_retrievers(
    examples: Sequence[Example],
    questions: Sequence[Question],
    old: Retriever,
    new: Retriever,
    k: int = 3,
    max_plain_loss: float = 0.01,
) -> Decision:
    """Compare two retrievers on held-out searches (Recall@k), and on plain questions.

    Passes where the interval of the gain lies above 0 and plain retrieval loses at most `max_plain_loss`.
    Intervals resample questions. Raises DataError without examples.
    """
    if not examples:
        raise DataError("the gate has no held-out search to judge by")
    asked = [(example.query, set(example.positives), "id") for example in examples]
    before, after = (_recalls(retriever, asked, k) for retriever in (old, new))
    clusters = [str(example.provenance.get("question_id", example.query)) for example in examples]
    gain = estimate((after - before)[:, None], clusters)[0]
    plain = _plain(questions, old, new, k)
    reason = _refusal(gain, plain, max_plain_loss)
    return Decision(
        passed=not reason,
        reason=reason or "finds more",
        k=k,
        searches=len(examples),
        old_recall=float(before.mean()),
        new_recall=float(after.mean()),
        gain=gain,
        plain=plain,
    )


def _refusal(gain: dict[str, Any], plain: dict[str, Any] | None, max_plain_loss: float) -> str:
    if gain["low"] is None:
        return "one question alone says nothing about others"
    if gain["low"] <= 0:
        return f"the gain's interval reaches {gain['low']:+.3f}: not above 0"
    if plain and plain["mean"] < -max_plain_loss:
        return f"plain questions lose {-plain['mean']:.3f}, allowed is {max_plain_loss}"
    return ""


def _plain(questions: Sequence[Question], old: Retriever, new: Retriever, k: int) -> dict[str, Any] | None:
    asked = [(question.text, *gold_passages(question)) for question in questions]
    asked = [each for each in asked if each[1]]
    if not asked:
        return None
    before, after = (_recalls(retriever, asked, k) for retriever in (old, new))
    clusters = [str(q.metadata.get("cluster", q.id)) for q in questions if gold_passages(q)[0]]
    return estimate((after - before)[:, None], clusters)[0]


def _recalls(retriever: Retriever, asked: Sequence[tuple[str, set[str], str]], k: int) -> np.ndarray:
    """Recall@k of each query, (N,)."""
    found: list[float] = []
    for start in range(0, len(asked), _TOGETHER):
        part = asked[start : start + _TOGETHER]
        for (_, wanted, field), hits in zip(part, retriever.search([q for q, _, _ in part], k), strict=True):
            found.append(len(wanted & {getattr(hit.passage, field) for hit in hits}) / len(wanted))
    return np.array(found)
