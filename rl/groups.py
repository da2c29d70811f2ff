"""Groups that are under way, in memory and on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agent.trajectory import Ledger, StopReason, Trajectory
from agent.transcripts import from_record, to_record
from data.records import Question


@dataclass(eq=False)
class OpenGroup:
    """The trajectories of one question, finished or not. No token of it is older than `version`."""

    number: int
    version: int
    question: Question
    ledgers: list[Ledger]
    finished: list[Trajectory | None]
    again: int = 0
    """Times that it was begun anew because the retriever was swapped meanwhile."""

    def to_record(self) -> dict[str, Any]:
        """Return the group as plain JSON values."""
        pairs = zip(self.ledgers, self.finished, strict=True)
        return {
            "number": self.number,
            "version": self.version,
            "members": [_member(self.question, ledger, trajectory) for ledger, trajectory in pairs],
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> OpenGroup:
        """Return the group that `to_record` wrote. Raises DataError."""
        read = [from_record(member) for member in record["members"]]
        finished = [member["finished"] for member in record["members"]]
        return cls(
            record["number"],
            record["version"],
            read[0].question,
            [Ledger(each.segments, each.searches) for each in read],
            [each if whole else None for each, whole in zip(read, finished, strict=True)],
        )


def _member(question: Question, ledger: Ledger, trajectory: Trajectory | None) -> dict[str, Any]:
    """A trajectory; one whose search failed counts as unfinished: the turn is written again."""
    finished = trajectory is not None and trajectory.stop_reason is not StopReason.SEARCH_FAILED
    if trajectory is None:  # the reason stands for none
        trajectory = Trajectory(question, ledger.segments, StopReason.TOKEN_LIMIT, searches=ledger.searches)
    return {**to_record(trajectory), "finished": finished}
