"""The groups of a step: trajectories of one question, with their rewards and what is measured of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import pstdev
from typing import TYPE_CHECKING

from agent.trajectory import SegmentKind, StopReason, Trajectory
from data.answers import exact_match

if TYPE_CHECKING:
    from rl.learner.workers import Totals


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

    counts = [t.counts for t in trajectories]
    counted = {name for each in counts for name in each if name != "pictures" or each[name]}
    stops = Counter(t.stop_reason for t in trajectories)
    scored = [reward for _, reward in pairs if not reward.error]
    names = scored[0].parts if scored else ()
    right = [t for t in trajectories if exact_match(t.answer, t.question.gold_answers)]
    return {
        "reward/mean": average([r.total for r in scored]),
        "reward/group_std": average([pstdev([r.total for r in g.rewards]) for g in groups]),
        **{f"reward/{name}": average([r.parts[name] for r in scored]) for name in names},
        "rollout/zero_variance_groups": average([g.flat for g in groups]),
        "rollout/em": (float(len(right)), float(len(trajectories))),
        **{f"rollout/{name}": average([each[name] for each in counts]) for name in counted},
        **{f"stop/{reason}": (float(stops[reason]), float(len(trajectories))) for reason in StopReason},
        "policy/correct_logprob": average([p for t in right for p in t.logprobs if p is not None]),
    }
