"""The questions of a step, rolled out and rewarded: whole groups of trajectories, ready to learn from.

What is drawn and sampled depends on the seed and on `position`, how many questions the run has drawn so far:
not on the number of processes, nor on where a run was interrupted.

Groups that are not yet trained on are a bounded queue, of each process its share. With `max_staleness` 0 it
is empty after every step. Above, what is under way at an update goes on with the new weights, and later
groups go before one that straggles for as long as none will be older than `max_staleness` updates when its
turn comes; what is sampled then also depends on when trajectories finish.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import pstdev
from typing import TYPE_CHECKING, Any

from agent.trajectory import Ledger, SegmentKind, StopReason, Trajectory
from data.errors import EngineError, RunStopped
from rl.algorithm.rewards import score_answer
from rl.groups import OpenGroup
from rl.question_mix import QuestionMix

if TYPE_CHECKING:
    from agent.rollout import Agent
    from data.records import Question
    from rl.algorithm.rewards import Reward
    from rl.config import TrainConfig
    from rl.learner.workers import Totals, Workers

logger = logging.getLogger(__name__)

MOST_AGAIN = 2
"""Times that a group is begun anew for a swap of the retriever."""
CLOSE_SECONDS = 60.0
"""Time for trajectories that were told to end to do so."""


@dataclass(frozen=True)
class Group:
    """The trajectories of one question and their rewards; `number` orders the groups of all processes."""

    number: int
    trajectories: list[Trajectory]
    rewards: list[Reward]

    @property
    def failures(self) -> list[str | None]:
        """The error of each trajectory; a group short of a member has another baseline."""
        pairs = zip(self.trajectories, self.rewards, strict=True)
        return [
            t.searches[-1].error if t.stop_reason is StopReason.SEARCH_FAILED else reward.error
            for t, reward in pairs
        ]

    @property
    def flat(self) -> bool:
        """Return whether all rewards agree, which says nothing about which trajectory was better."""
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


@dataclass(frozen=True)
class _Report:
    """A process's part of a round, for the other processes."""

    broken: str | None
    """The reason why its rollouts ended."""
    failures: list[str | None]
    """The error of each trajectory of the round."""
    usable: list[int]
    """Numbers of the step's groups so far that can be learned from."""
    drawn: int
    """The step's groups so far."""


class Rollouts:
    """Draws questions in order and lets the agent answer this process's share of them."""

    def __init__(
        self,
        agent: Agent,
        questions: Sequence[Question],
        reward: Callable[[Sequence[Trajectory]], list[Reward]],
        config: TrainConfig,
        workers: Workers,
    ) -> None:
        self.agent = agent
        self.reward, self.config, self.workers = reward, config, workers
        self.mix = QuestionMix(questions, config)
        self.share = len(range(workers.rank, config.rollout.questions_per_step, workers.count))
        self.most_batches = config.rollout.batches_in_flight
        self.in_flight: list[OpenGroup] = []  # this process's share, oldest first
        self.taken: list[OpenGroup] = []  # in the step under way
        self.batches = 0  # begun and not taken, by each process its share
        self.position = 0  # questions that the run has drawn so far
        self.settled = 0  # of these, before the step under way
        self._tasks: set[asyncio.Task[list[Trajectory]]] = set()
        self._failure: BaseException | None = None
        self._changed = asyncio.Event()

    async def collect(self, version: int, progress: Callable[[int], object] = lambda done: None) -> Collected:
        """Return the groups of the step after `version`, numbered from 0 over all processes.

        progress: told how many trajectories of this process's share are finished, anew for each round.

        With dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) flat groups are replaced by those
        of further questions, for some rounds. Raises RunStopped where too much failed.
        """
        wanted, rounds = self.config.rollout.questions_per_step, self.config.algorithm.dynamic_sampling_rounds
        self.taken, self.settled = [], self.position
        groups: list[Group] = []
        usable: list[Group] = []
        reports: list[_Report] = []
        numbers: list[int] = []
        for _ in range(1 + rounds):
            drawn, broken = await self._next(version, progress)
            groups += drawn
            usable += [g for g in drawn if self._is_usable(g) and not (rounds and g.flat)]
            failures = [failure for group in drawn for failure in group.failures]
            reports = self.workers.gather(_Report(broken, failures, [g.number for g in usable], len(groups)))
            self._check_failures(reports)
            numbers = sorted(number for each in reports for number in each.usable)[:wanted]
            if len(numbers) == wanted:
                break
        places = {number: place for place, number in enumerate(numbers)}
        chosen = [replace(g, number=places[g.number]) for g in usable if g.number in places]
        totals = totals_of(groups)
        if self.config.rollout.mixed_generations:
            mixed = sum(is_mixed(g.trajectories) for g in groups)
            totals["rollout/mixed_generations"] = (float(mixed), float(len(groups)))
        if self.config.rollout.max_staleness:
            lags = [staleness(t, version) for g in groups for t in g.trajectories]
            totals["rollout/staleness"] = (float(sum(lags)), float(len(lags)))
        self.taken, self.settled = [], self.position
        return Collected(chosen, len(places), sum(each.drawn for each in reports), totals)

    def _is_usable(self, group: Group) -> bool:
        apart = self.config.rollout.mixed_generations or not is_mixed(group.trajectories)
        return apart and not any(group.failures)

    async def _next(self, version: int, progress: Callable[[int], object]) -> tuple[list[Group], str | None]:
        """Return one batch, as many groups as this process has in any, or why there is none.

        Later ones are begun before it.
        """
        rollout = self.config.rollout
        steps_left = self.config.steps - version
        while self.batches < max(1, min(self.most_batches, steps_left)):
            self._begin(version)
        broken, taken = None, []
        try:
            taken = await self._take(self.share, version, progress)
        except TimeoutError:
            broken = f"no trajectories for {rollout.deadline_seconds:g} s (rollout.deadline_seconds)"
        except EngineError as error:
            broken = str(error)
        self.taken += taken
        self.batches -= 1
        finished = [[t for t in group.finished if t is not None] for group in taken]
        rewards = iter(self.reward([trajectory for members in finished for trajectory in members]))
        groups = [
            Group(group.number, members, list(islice(rewards, rollout.group_size)))
            for group, members in zip(taken, finished, strict=True)
        ]
        return groups, broken

    def _begin(self, version: int) -> None:
        """Begin this process's share of the next questions."""
        count, size = self.config.rollout.questions_per_step, self.config.rollout.group_size
        mine = range(self.position + self.workers.rank, self.position + count, self.workers.count)
        self.position += count
        self.batches += 1
        drawn = [(number, self.mix.draw(number)) for number in mine]
        self._roll_out(
            [OpenGroup(n, version, q, [Ledger() for _ in range(size)], [None] * size) for n, q in drawn]
        )

    def _roll_out(self, groups: Sequence[OpenGroup]) -> None:
        """Let the agent finish these groups, as one batch; each trajectory has a seed by its number."""
        self.in_flight += [group for group in groups if group not in self.in_flight]
        slots = [(g, at) for g in groups for at, trajectory in enumerate(g.finished) if trajectory is None]

        def on_finished(index: int, trajectory: Trajectory) -> None:
            group, at = slots[index]
            group.finished[at] = trajectory
            self._keep_apart(group)
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

    def _keep_apart(self, group: OpenGroup) -> None:
        """Begin a group anew that is done, and of whose searches a swap of the retriever came in between."""
        mixed = None not in group.finished and is_mixed(group.finished)
        if self.config.rollout.mixed_generations or not mixed or group.again == MOST_AGAIN:
            return
        logger.warning("group %d met a swap of the retriever: it is rolled out anew", group.number)
        group.ledgers = [Ledger() for _ in group.finished]
        group.finished = [None] * len(group.finished)
        group.again += 1
        self._roll_out([group])

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
                lengths = (len(g.finished) - g.finished.count(None) for g in self.in_flight)
                progress(sum(sorted(lengths, reverse=True)[:count]))
                self._changed.clear()
                await self._changed.wait()

    def _ripe(self, count: int, version: int) -> list[OpenGroup] | None:
        chosen = [group for group in self.in_flight if None not in group.finished][:count]
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

    def _check_failures(self, reports: Sequence[_Report]) -> None:
        """Stop the run where too many searches or rewards failed; nothing of the batch is trained."""
        ended = (
            f"the state before this step is saved in {self.config.out}: start the same command again to go on"
        )
        for rank, report in enumerate(reports):
            if report.broken:
                raise RunStopped(f"rollouts of process {rank} ended: {report.broken}; {ended}")
        everywhere = [reason for report in reports for reason in report.failures]
        failed = [reason for reason in everywhere if reason]
        if failed and self.workers.leads:
            logger.warning("%d of %d trajectories lost to %s", len(failed), len(everywhere), failed[0])
        allowed = self.config.rollout.max_failed_share
        if len(failed) > allowed * len(everywhere):
            raise RunStopped(
                f"searches or rewards failed in {len(failed)} of {len(everywhere)} trajectories "
                f"(allowed: {allowed:.0%}; {failed[0]}); {ended}"
            )


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
    counted = dict.fromkeys(name for each in counts for name in each if name != "pictures" or each[name])
    stops = Counter(t.stop_reason for t in trajectories)
    scored = [reward for _, reward in pairs if not reward.error]
    names = scored[0].parts if scored else ()
    right = [t for t in trajectories if score_answer("em", t)]
    written = [segment for t in right for segment in t.segments if segment.kind is SegmentKind.POLICY]
    return {
        "reward/mean": average([r.total for r in scored]),
        "reward/group_std": average([pstdev([r.total for r in g.rewards]) for g in groups]),
        **{f"reward/{name}": average([r.parts[name] for r in scored]) for name in names},
        "rollout/zero_variance_groups": average([g.flat for g in groups]),
        "rollout/em": (float(len(right)), float(len(trajectories))),
        **{f"rollout/{name}": average([each[name] for each in counts]) for name in counted},
        **{f"stop/{reason}": (float(stops[reason]), float(len(trajectories))) for reason in StopReason},
        "policy/correct_logprob": average([p for s in written for p in s.logprobs or () if p is not None]),
    }


def is_mixed(trajectories: Iterable[Trajectory | None]) -> bool:
    """Return whether searches of these were answered by several generations of the retriever."""
    searches = [search for t in trajectories if t is not None for search in t.searches]
    return len({hit.generation for search in searches for hit in search.hits if hit.generation}) > 1
