"""Groups that were begun and are not yet trained on: the bounded queue between rollouts and updates.

With a bound of no staleness it is empty after every step, and rollouts and updates take turns. Above, what
is under way at an update goes on with the new weights, and a group that straggles lets later ones go
first for as long as no group, itself included, will be older than `max_staleness` updates when its turn
comes. Each process has a queue of its own share; all draw and take in the same order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agent.trajectory import Ledger, SegmentKind, StopReason, Trajectory
from agent.transcripts import from_record, to_record

if TYPE_CHECKING:
    from agent.rollout import Agent
    from data.records import Question

CLOSE_SECONDS = 60.0
"""How long trajectories that were told to end may take to do so."""


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
        """Those that are finished."""
        return [trajectory for trajectory in self.finished if trajectory is not None]

    @property
    def done(self) -> bool:
        """Whether all are."""
        return None not in self.finished

    def to_record(self) -> dict[str, Any]:
        """All there is of it, as plain JSON values."""
        pairs = zip(self.ledgers, self.finished, strict=True)
        return {
            "number": self.number,
            "version": self.version,
            "members": [_member(self.question, ledger, trajectory) for ledger, trajectory in pairs],
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> OpenGroup:
        """The group that `to_record` wrote. Raises DataError."""
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


@dataclass(eq=False)
class InFlight:
    """One process's share of what is in flight, oldest first."""

    agent: Agent
    seed: int
    max_staleness: int
    groups: list[OpenGroup] = field(default_factory=list)
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    _failure: BaseException | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def begin(self, groups: Sequence[OpenGroup]) -> None:
        """Roll these groups out, as one batch; each of their trajectories has a seed by its number."""
        self.groups += groups
        slots = [(g, at) for g in groups for at, trajectory in enumerate(g.finished) if trajectory is None]

        def on_finished(index: int, trajectory: Trajectory) -> None:
            group, at = slots[index]
            group.finished[at] = trajectory
            self._changed.set()

        rollout = self.agent.rollout(
            [group.question for group, _ in slots],
            self.seed,
            on_finished,
            keys=[group.number * len(group.finished) + at for group, at in slots],
            ledgers=[group.ledgers[at] for group, at in slots],
        )
        task = asyncio.get_running_loop().create_task(rollout)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failure = self._failure or task.exception()
            self._changed.set()

    async def take(
        self,
        count: int,
        version: int,
        deadline_seconds: float,
        progress: Callable[[int], object] = lambda finished: None,
    ) -> list[OpenGroup]:
        """The oldest `count` finished groups for the update of `version`, when no other is due before them.

        `progress` is told how many trajectories of so many groups are finished. Raises TimeoutError past
        the deadline, and what a rollout raised.
        """
        if not count:
            return []
        async with asyncio.timeout(deadline_seconds):
            while True:
                if self._failure is not None:
                    raise self._failure
                if (chosen := self._ripe(count, version)) is not None:
                    self.groups = [group for group in self.groups if group not in chosen]
                    return chosen
                progress(sum(sorted((len(g.trajectories) for g in self.groups), reverse=True)[:count]))
                self._changed.clear()
                await self._changed.wait()

    def _ripe(self, count: int, version: int) -> list[OpenGroup] | None:
        chosen = [group for group in self.groups if group.done][:count]
        left = [group for group in self.groups if group not in chosen]
        # The others are trained on `count` a step from the next one on, the oldest first.
        in_time = all(g.version + self.max_staleness > version + at // count for at, g in enumerate(left))
        return chosen if len(chosen) == count and in_time else None

    async def close(self) -> None:
        """End what is under way, and forget all."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
        self.groups, self._failure = [], None


def staleness(trajectory: Trajectory, version: int) -> int:
    """Updates from the oldest weights that wrote in it to `version`."""
    written = [s.weights_version for s in trajectory.segments if s.kind is SegmentKind.POLICY]
    return version - min(written, default=version)
