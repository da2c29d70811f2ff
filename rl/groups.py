"""The groups of a step: trajectories of one question, with their rewards and what is measured of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import pstdev
from typing import TYPE_CHECKING, Any

from agent.trajectory import Ledger, SegmentKind, StopReason, Trajectory
from agent.transcripts import from_record, to_record
from data.answers import exact_match

if TYPE_CHECKING:
    from data.records import Question

Totals = dict[str, tuple[float, float]]
"""Metrics that can still be averaged over processes: the sum of the values, and of their weights."""


@dataclass(frozen=True)
class Reward:
    """The reward of a trajectory."""

    turns: list[float]
    """Weighted, one a policy turn; the reward of the outcome is on the last."""
    parts: dict[str, float]
    """By name, summed over the turns, without weights; rewards that failed are not among them."""
    error: str | None = None
    """The reason of a failure; the trajectory then stays out of the loss."""

    @property
    def total(self) -> float:
        """The weighted sum."""
        return sum(self.turns)


@dataclass(frozen=True)
class Group:
    """The trajectories of one question and their rewards; `number` orders the groups of all processes."""

    number: int
    trajectories: list[Trajectory]
    rewards: list[Reward]

    @property
    def complete(self) -> bool:
        """Whether nothing failed: a group short of a member has another baseline."""
        failed = any(t.stop_reason is StopReason.SEARCH_FAILED for t in self.trajectories)
        return not failed and not any(reward.error for reward in self.rewards)

    @property
    def flat(self) -> bool:
        """Whether all rewards agree, which says nothing about which trajectory was better."""
        totals = [reward.total for reward in self.rewards]
        return min(totals) == max(totals)


@dataclass(frozen=True)
class Collected:
    """The groups that one step learns from."""

    groups: list[Group]
    """This process's, whole and usable."""
    count: int
    """Groups of all processes."""
    drawn: int
    """Groups of all processes that were used up for it, usable or not."""
    totals: Totals
    """Metrics of everything that was rolled out, used or not."""


@dataclass(eq=False)
class OpenGroup:
    """The trajectories of one question, finished or not. No token of it is older than `version`."""

    number: int
    version: int
    question: Question
    ledgers: list[Ledger]
    finished: list[Trajectory | None]

    @property
    def trajectories(self) -> list[Trajectory]:
        """The finished trajectories."""
        return [trajectory for trajectory in self.finished if trajectory is not None]

    @property
    def done(self) -> bool:
        """Whether all are finished."""
        return None not in self.finished

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


def staleness(trajectory: Trajectory, version: int) -> int:
    """Count the updates from the oldest weights that wrote in a trajectory to `version`."""
    written = [s.weights_version for s in trajectory.segments if s.kind is SegmentKind.POLICY]
    return version - min(written, default=version)


def totals_of(groups: Sequence[Group]) -> Totals:
    """Measure what the trajectories of a step did and earned, to be averaged over all processes."""
    pairs = [pair for g in groups for pair in zip(g.trajectories, g.rewards, strict=True)]
    trajectories = [t for t, _ in pairs]

    def average(values: Sequence[float]) -> tuple[float, float]:
        return float(sum(values)), float(len(values))

    shown = any(t.pictures for t in trajectories)
    stops = Counter(t.stop_reason for t in trajectories)
    scored = [reward for _, reward in pairs if not reward.error]
    right = [t for t in trajectories if exact_match(t.answer, t.question.gold_answers)]
    names = scored[0].parts if scored else ()
    return {
        "reward/mean": average([r.total for r in scored]),
        "reward/group_std": average([pstdev([r.total for r in g.rewards]) for g in groups]),
        **{f"reward/{name}": average([r.parts[name] for r in scored]) for name in names},
        "rollout/zero_variance_groups": average([g.flat for g in groups]),
        "rollout/em": (float(len(right)), float(len(trajectories))),
        "rollout/searches": average([len(t.searches) for t in trajectories]),
        "rollout/valid_format": average([t.valid_format for t in trajectories]),
        "rollout/invalid_actions": average([t.invalid_actions for t in trajectories]),
        "rollout/policy_tokens": average([sum(t.loss_mask) for t in trajectories]),
        "rollout/total_tokens": average([len(t.token_ids) for t in trajectories]),
        **({"rollout/pictures": average([len(t.pictures) for t in trajectories])} if shown else {}),
        **{f"stop/{reason}": (float(stops[reason]), float(len(trajectories))) for reason in StopReason},
        "policy/correct_logprob": average([p for t in right for p in t.logprobs if p is not None]),
    }


def add_total(totals: Totals, name: str, value: float, weight: float) -> None:
    """Add to the sum of a metric and to the sum of its weights."""
    before = totals.get(name, (0.0, 0.0))
    totals[name] = (before[0] + value, before[1] + weight)


def averages(parts: Sequence[Totals]) -> dict[str, float]:
    """Average metrics over all processes; what nobody measured is left out."""
    sums: Totals = {}
    for part in parts:
        for name, (value, weight) in part.items():
            add_total(sums, name, value, weight)
    return {name: value / weight for name, (value, weight) in sums.items() if weight}
