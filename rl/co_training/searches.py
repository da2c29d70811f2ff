"""Searches of a trajectory file, as labellers read them: text only, the compact form is enough."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agent.tools import SEARCH
from agent.trajectory import SegmentKind
from agent.transcripts import check_format, trajectory_file
from data.errors import DataError
from data.jsonl import numbered_jsonl
from data.metrics.answers import exact_match
from data.records import Passage, Question


@dataclass(frozen=True)
class Searched:
    """One call of a tool: the argument, the passages shown, and what the policy wrote next."""

    query: str
    passages: tuple[Passage, ...]
    tool: str
    next_text: str
    """Text of the policy's next turn; "" if there is none."""
    next_tokens: int
    turn: int = 0
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Passage id -> scorer -> score (`rl.co_training.scores`), also of passages that were not shown."""


@dataclass(frozen=True)
class Searches:
    """The searches of one trajectory, in order, and how it ended."""

    question: Question
    calls: tuple[Searched, ...]
    answer: str | None
    place: str
    """FILE:LINE, for messages."""
    segments: tuple[Mapping[str, Any], ...] = ()
    """Segments as the file has them."""
    number: int = 0
    """Line of the file, from 1."""

    @property
    def group(self) -> str:
        """Return the id of the question that this is a sample of."""
        return str(self.question.metadata.get("sample_of", self.question.id))

    @property
    def is_correct(self) -> bool:
        """Return whether the answer is an exact match of a gold answer."""
        return exact_match(self.answer, self.question.gold_answers, self.question.normalizer) == 1.0


def read_searches(path: str | Path, scores: str | Path | None = None) -> Iterator[Searches]:
    """Yield the searches of each trajectory of a file, in its order; failed searches are left out.

    path: the file, or the folder of an evaluation. scores: a file of `sleuth score-searches` about this one.
    Reads trajectories of training and of `sleuth evaluate` alike. Raises DataError "FILE:LINE: ...".
    """
    path = trajectory_file(path)
    known = read_scores(scores) if scores else {}
    for number, record in numbered_jsonl(path, tolerate_cut_tail=True):
        place = f"{path}:{number}"
        check_format(record, place)
        try:
            yield _searches(record, place, number, known)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{place}: no trajectory: {type(error).__name__} {error}") from error


def read_scores(path: str | Path) -> dict[tuple[int, int], Mapping[str, Any]]:
    """Return the records of a file of scores by line and call of their trajectories."""
    found = {}
    for number, each in numbered_jsonl(Path(path), tolerate_cut_tail=True):
        scores = each.get("scores")
        if not (isinstance(scores, dict) and all(isinstance(of, dict) for of in scores.values())):
            raise DataError(f"{path}:{number}: no scores of `sleuth score-searches`")
        found[each.get("line"), each.get("call")] = {"id": None, "query": None, "cost": {}, **each}
    return found


def _searches(
    record: Mapping[str, Any], place: str, number: int, known: Mapping[tuple[int, int], Mapping[str, Any]]
) -> Searches:
    golds, metadata = record["gold_answers"], dict(record["metadata"])
    if not isinstance(golds, list):
        raise ValueError(f"gold_answers {golds!r} are no list")
    question = Question(record["id"], record["question"], tuple(golds), metadata)
    turns = [each for each in record["segments"] if each["kind"] == SegmentKind.POLICY]
    calls = [_call(search, turns) for search in record["searches"] if search.get("error") is None]
    for at, call in enumerate(calls):
        if scored := known.get((number, at)):
            if (scored["id"], scored["query"]) != (question.id, call.query):
                raise ValueError(f"the scores are of another file: {scored['query']!r}, here {call.query!r}")
            calls[at] = replace(call, scores=scored["scores"])
    segments = tuple(record["segments"])
    return Searches(question, tuple(calls), record["answer"], place, segments, number)


def _call(search: Mapping[str, Any], turns: list[Mapping[str, Any]]) -> Searched:
    following = turns[search["turn"] + 1 :][:1]
    return Searched(
        query=search["query"],
        passages=tuple(Passage(hit["id"], hit["text"], hit["title"]) for hit in search["hits"]),
        tool=search.get("tool", SEARCH.name),
        next_text=following[0]["text"] if following else "",
        next_tokens=_tokens(following[0]) if following else 0,
        turn=search["turn"],
    )


def _tokens(segment: Mapping[str, Any]) -> int:
    return int(segment["tokens"]) if "tokens" in segment else len(segment["token_ids"])
