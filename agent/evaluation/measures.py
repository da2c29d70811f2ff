"""Measures of one question's trajectory: scores, cost, and when searches found the gold passages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from agent.evaluation.records import judge_answer
from agent.trajectory import SearchRecord, Trajectory
from agent.transcripts import to_record
from data.formats.rows import ids_of
from data.metrics.answers import METRICS, is_abstention
from data.records import Question

GOLD_KEYS = {"supporting_ids": "id", "supporting_titles": "title", "entities": "id"}
"""The keys of a question's metadata that may name its gold passages, and by what; the first found counts.
`entities` is how the embedded world names them."""


def gold_passages(question: Question) -> tuple[set[str], str]:
    """The question's gold passages, and which field of a passage names them; none: an empty set."""
    for key, field in GOLD_KEYS.items():
        if names := ids_of(question.metadata.get(key), key):
            return set(names), field
    return set(), "id"


def evidence(question: Question, searches: Sequence[SearchRecord]) -> dict[str, Any]:
    """Measures of the searches of one trajectory.

    evidence_recall: share of the gold passages that any search found; None where the question names none.
    searches_after_evidence: searches made once all of them had been found; None where they never were.
    novelty: of each search, the share of its passages that no earlier one had found.
    searches_after_nothing_new: searches made although the two before had found no passage that was new.
    generations: of the indexes that answered.
    """
    gold, field = gold_passages(question)
    missing, seen, after, novelty = set(gold), set[str](), 0, []
    for search in searches:
        after += bool(gold) and not missing
        found = {hit.passage.id for hit in search.hits}
        novelty.append(len(found - seen) / max(len(found), 1))
        seen |= found
        missing -= {getattr(hit.passage, field) for hit in search.hits}
    return {
        "evidence_recall": 1 - len(missing) / len(gold) if gold else None,
        "searches_after_evidence": after if gold and not missing else None,
        "novelty": novelty,
        "searches_after_nothing_new": sum(not any(pair) for pair in list(pairwise(novelty))[:-1]),
        "generations": sorted(
            {hit.generation for search in searches for hit in search.hits if hit.generation}
        ),
    }


def evaluation_record(trajectory: Trajectory, tokens: bool = False) -> dict[str, Any]:
    """The record of a trajectory with its scores and measures (docs/evaluation.md lists them).

    tokens: with token ids and log-probs; else compact.
    """
    record, counts = to_record(trajectory, tokens), trajectory.counts
    scores = dict(zip(METRICS, judge_answer(record), strict=True))
    return {
        **record,
        **scores,
        "abstained": is_abstention(trajectory.answer),
        "confidence": trajectory.confidence,
        "tokens_in": counts["total_tokens"] - counts["policy_tokens"],
        "tokens_out": counts["policy_tokens"],
        "seconds": round(trajectory.seconds, 4),
        **evidence(trajectory.question, trajectory.searches),
    }
