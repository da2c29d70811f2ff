"""The questions of a step, rolled out and rewarded: whole groups of trajectories, ready to learn from.

What is drawn and sampled depends on the seed and on `position` alone, how many questions the run has
drawn so far: not on the number of processes, nor on where a run was interrupted.

Groups that were begun and are not yet trained on are a bounded queue between rollouts and updates. With
`max_staleness` 0 it is empty after every step: rollouts and updates take turns. Above, what is under way at
an update goes on with the new weights, and a group that straggles lets later ones go first for as long as no
group, itself included, will be older than `max_staleness` updates when its turn comes; what is sampled then
also depends on when trajectories finish. Each process has a queue of its own share; all draw and take in the
same order.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

from agent.rollout import Ledger
from agent.trajectory import StopReason, Trajectory
from agent.transcripts import from_record, to_record
from data.errors import EngineError, RunStopped
from data.progress import Bar, no_bar
from rl.groups import Collected, Group, staleness, totals_of

if TYPE_CHECKING:
    from agent.rollout import Agent
    from data.records import Question
    from rl.algorithm.rewards import Reward
    from rl.config import TrainConfig
    from rl.learner.workers import Workers

logger = logging.getLogger(__name__)

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


class Rollouts:
    """Draws questions in order and lets the agent answer this process's share of them."""

    def __init__(
        self,
        agent: Agent,
        questions: Sequence[Question],
        reward: Callable[[Sequence[Trajectory]], list[Reward]],
        config: TrainConfig,
        workers: Workers,
        bar: Bar = no_bar,
    ) -> None:
        self.agent, self.bar = agent, bar
        self.questions, self.reward, self.config, self.workers = questions, reward, config, workers
        self.most_batches = config.rollout.batches_in_flight
        self.in_flight: list[OpenGroup] = []  # this process's share, oldest first
        self.taken: list[OpenGroup] = []  # in the step under way
        self.batches = 0  # begun and not taken, by each process its share
        self.position = 0  # questions that the run has drawn so far
        self.settled = 0  # of these, before the step under way
        self._tasks: set[asyncio.Task[list[Trajectory]]] = set()
        self._failure: BaseException | None = None
        self._changed = asyncio.Event()

    async def collect(self, version: int) -> Collected:
        """Return the groups of the step after `version`, numbered from 0 over all processes.

        With dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) flat groups are replaced by those
        of further questions, for some rounds. Raises RunStopped where too much failed.
        """
        wanted, rounds = self.config.rollout.questions_per_step, self.config.algorithm.dynamic_sampling_rounds
        self.taken, self.settled = [], self.position
        groups: list[Group] = []
        usable: list[Group] = []
        for _ in range(1 + rounds):
            drawn = await self._next(version)
            groups += drawn
            usable += [g for g in drawn if g.complete and not (rounds and g.flat)]
            if not rounds or sum(self.workers.gather(len(usable))) >= wanted:
                break
        numbers = sorted(n for part in self.workers.gather([g.number for g in usable]) for n in part)[:wanted]
        places = {number: place for place, number in enumerate(numbers)}
        chosen = [replace(g, number=places[g.number]) for g in usable if g.number in places]
        totals = totals_of(groups)
        if self.config.rollout.max_staleness:
            lags = [staleness(t, version) for g in groups for t in g.trajectories]
            totals["rollout/staleness"] = (float(sum(lags)), float(len(lags)))
        self.taken, self.settled = [], self.position
        return Collected(chosen, len(numbers), sum(self.workers.gather(len(groups))), totals)

    async def _next(self, version: int) -> list[Group]:
        """Return one batch, as many groups as this process has in any; later ones are begun before it."""
        rollout = self.config.rollout
        steps_left = self.config.steps - version
        while self.batches < max(1, min(self.most_batches, steps_left)):
            self._begin(version)
        count = len(range(self.workers.rank, rollout.questions_per_step, self.workers.count))
        broken, taken = None, []
        try:
            with self.bar("answering questions", count * rollout.group_size) as move:
                taken = await self._take(count, version, move)
        except TimeoutError:
            broken = f"no trajectories for {rollout.deadline_seconds:g} s (rollout.deadline_seconds)"
        except EngineError as error:
            broken = str(error)
        self.taken += taken
        self.batches -= 1
        rewards = iter(self.reward([t for group in taken for t in group.trajectories]))
        groups = [
            Group(group.number, group.trajectories, list(islice(rewards, rollout.group_size)))
            for group in taken
        ]
        self._check_failures(groups, broken)
        return groups

    def _begin(self, version: int) -> None:
        """Begin this process's share of the next questions."""
        count, size = self.config.rollout.questions_per_step, self.config.rollout.group_size
        mine = range(self.position + self.workers.rank, self.position + count, self.workers.count)
        self.position += count
        self.batches += 1
        drawn = [(number, draw_question(self.questions, number, self.config.seed)) for number in mine]
        self._roll_out(
            [OpenGroup(n, version, q, [Ledger() for _ in range(size)], [None] * size) for n, q in drawn]
        )

    def _roll_out(self, groups: Sequence[OpenGroup]) -> None:
        """Let the agent finish these groups, as one batch; each trajectory has a seed by its number."""
        self.in_flight += groups
        slots = [(g, at) for g in groups for at, trajectory in enumerate(g.finished) if trajectory is None]

        def on_finished(index: int, trajectory: Trajectory) -> None:
            group, at = slots[index]
            group.finished[at] = trajectory
            self._changed.set()

        rollout = self.agent.rollout(
            [group.question for group, _ in slots],
            self.config.seed,
            on_finished,
            keys=[group.number * len(group.finished) + at for group, at in slots],
            ledgers=[group.ledgers[at] for group, at in slots],
        )
        task = asyncio.get_running_loop().create_task(rollout)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[list[Trajectory]]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failure = self._failure or task.exception()
            self._changed.set()

    async def _take(self, count: int, version: int, progress: Callable[[int], object]) -> list[OpenGroup]:
        """Wait for the oldest `count` finished groups that may go before the others.

        `progress` is told how many trajectories of so many groups are finished. Raises TimeoutError past
        the deadline, and what a rollout raised.
        """
        if not count:
            return []
        async with asyncio.timeout(self.config.rollout.deadline_seconds):
            while True:
                if self._failure is not None:
                    raise self._failure
                if (chosen := self._ripe(count, version)) is not None:
                    self.in_flight = [group for group in self.in_flight if group not in chosen]
                    return chosen
                progress(sum(sorted((len(g.trajectories) for g in self.in_flight), reverse=True)[:count]))
                self._changed.clear()
                await self._changed.wait()

    def _ripe(self, count: int, version: int) -> list[OpenGroup] | None:
        chosen = [group for group in self.in_flight if group.done][:count]
        left = [group for group in self.in_flight if group not in chosen]
        # The others are trained on `count` a step from the next one on, the oldest first.
        oldest = version - self.config.rollout.max_staleness
        in_time = all(group.version > oldest + at // count for at, group in enumerate(left))
        return chosen if len(chosen) == count and in_time else None

    def kept(self) -> list[dict[str, Any]]:
        """Return as records what is in flight from before the step under way, which is done again."""
        held = [*self.taken, *self.in_flight]
        return [group.to_record() for group in held if group.number < self.settled]

    def restore(self, position: int, records: Sequence[Mapping[str, Any]], version: int) -> None:
        """Go on after `position`, with this process's share of what all had in flight, by number.

        What no longer fits, because batch, group or staleness have changed, is dropped with a warning.
        """
        rollout = self.config.rollout
        count, size, oldest = rollout.questions_per_step, rollout.group_size, version - rollout.max_staleness
        self.position = self.settled = position
        fits = len(records) % count == 0 and all(
            len(record["members"]) == size and record["version"] >= oldest + at // count
            for at, record in enumerate(records)
        )
        if not fits:
            logger.warning("the configuration has changed: %d groups in flight are dropped", len(records))
            records = []
        self.batches = len(records) // count
        for start in range(0, len(records), count):
            batch = records[start : start + count][self.workers.rank :: self.workers.count]
            self._roll_out([OpenGroup.from_record(record) for record in batch])

    async def close(self) -> None:
        """End what is under way, and forget it."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
        self.in_flight, self._failure = [], None
        self.taken, self.batches = [], 0

    def _check_failures(self, groups: Sequence[Group], broken: str | None) -> None:
        """Stop the run where too many searches or rewards failed; nothing of the batch is trained."""
        reasons = [
            t.searches[-1].error if t.stop_reason is StopReason.SEARCH_FAILED else reward.error
            for group in groups
            for t, reward in zip(group.trajectories, group.rewards, strict=True)
        ]
        found = self.workers.gather((broken, reasons))
        ended = (
            f"the state before this step is saved in {self.config.out}: start the same command again to go on"
        )
        for rank, (said, _) in enumerate(found):
            if said:
                raise RunStopped(f"rollouts of process {rank} ended: {said}; {ended}")
        everywhere = [reason for _, part in found for reason in part]
        failed = [reason for reason in everywhere if reason]
        if failed and self.workers.leads:
            logger.warning("%d of %d trajectories lost to %s", len(failed), len(everywhere), failed[0])
        allowed = self.config.rollout.max_failed_share
        if len(failed) > allowed * len(everywhere):
            raise RunStopped(
                f"searches or rewards failed in {len(failed)} of {len(everywhere)} trajectories "
                f"(allowed: {allowed:.0%}; {failed[0]}); {ended}"
            )


def draw_question(questions: Sequence[Question], number: int, seed: int) -> Question:
    """Return the number-th question of a run: a new order every epoch, which depends on the seed alone."""
    epoch, index = divmod(number, len(questions))
    return questions[_order(len(questions), f"{seed}/{epoch}")[index]]


@lru_cache(maxsize=4)
def _order(count: int, key: str) -> list[int]:
    return random.Random(key).sample(range(count), count)
