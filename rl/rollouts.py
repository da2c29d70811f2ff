"""The questions of a step, rolled out and rewarded: whole groups of trajectories, ready to learn from.

What is drawn and sampled depends on the seed and on `position` alone, how many questions the run has
drawn so far: not on the number of processes, nor on where a run was interrupted. With `max_staleness` it also
depends on when trajectories finish.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from statistics import pstdev
from typing import TYPE_CHECKING, Any

from agent.trajectory import Ledger, StopReason, Trajectory
from data.answers import exact_match
from data.errors import EngineError, RunStopped
from data.progress import Bar, no_bar
from rl.in_flight import InFlight, OpenGroup, staleness

if TYPE_CHECKING:
    from agent.rollout import Agent
    from data.records import Question
    from rl.algorithm.rewards import Reward
    from rl.config import TrainConfig
    from rl.learner.workers import Workers

logger = logging.getLogger(__name__)

Totals = dict[str, tuple[float, float]]
"""Metrics that can still be averaged over processes: the sum of the values, and of their weights."""


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
    """What one step learns from."""

    groups: list[Group]
    """This process's, whole and usable."""
    count: int
    """Groups of all processes."""
    drawn: int
    """Groups of all processes that were used up for it, usable or not."""
    totals: Totals
    """Of everything that was rolled out, used or not."""


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
        self.bar = bar
        self.questions, self.reward, self.config, self.workers = questions, reward, config, workers
        self.in_flight = InFlight(agent, config.seed, config.rollout.max_staleness)
        self.taken: list[OpenGroup] = []  # in the step under way
        self.batches = 0  # begun and not taken, by each process its share
        self.position = 0  # questions that the run has drawn so far
        self.settled = 0  # of these, before the step under way

    async def collect(self, version: int) -> Collected:
        """The groups of the step after `version`, numbered from 0 over all processes.

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
        """One batch: as many groups as this process has in any. Those behind it are begun before the wait."""
        rollout = self.config.rollout
        steps_left = self.config.steps - version
        while self.batches < max(1, min(rollout.batches_in_flight, steps_left)):
            self._begin(version)
        count = len(range(self.workers.rank, rollout.questions_per_step, self.workers.count))
        broken, taken = None, []
        try:
            with self.bar("answering questions", count * rollout.group_size) as move:
                taken = await self.in_flight.take(count, version, rollout.deadline_seconds, move)
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
        self.in_flight.begin(
            [
                OpenGroup(
                    number,
                    version,
                    draw_question(self.questions, number, self.config.seed),
                    [Ledger() for _ in range(size)],
                    [None] * size,
                )
                for number in mine
            ]
        )

    def kept(self) -> list[dict[str, Any]]:
        """What this process has in flight from before the step under way, which is done again, as records."""
        held = [*self.taken, *self.in_flight.groups]
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
            self.in_flight.begin([OpenGroup.from_record(record) for record in batch])

    async def close(self) -> None:
        """End what is under way, and forget it."""
        await self.in_flight.close()
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
    """The number-th question of a run: a new order every epoch, which depends on the seed alone."""
    epoch, index = divmod(number, len(questions))
    return questions[_order(len(questions), f"{seed}/{epoch}")[index]]


@lru_cache(maxsize=4)
def _order(count: int, key: str) -> list[int]:
    return random.Random(key).sample(range(count), count)


def totals_of(groups: Sequence[Group]) -> Totals:
    """What the trajectories of a step did and earned, to be averaged over all processes."""
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
        "policy/correct_logprob": average([logprob for t in right for logprob in _written(t)]),
    }


def _written(trajectory: Trajectory) -> list[float]:
    """The sampler's log-probs of the tokens that the policy sampled."""
    return [logprob for logprob in trajectory.logprobs if logprob is not None]


def averages(parts: Sequence[Totals]) -> dict[str, float]:
    """The metrics of all processes as one; what nobody measured is left out."""
    sums: dict[str, list[float]] = {}
    for part in parts:
        for name, pair in part.items():
            sums[name] = [a + b for a, b in zip(sums.get(name, [0.0, 0.0]), pair, strict=True)]
    return {name: value / weight for name, (value, weight) in sums.items() if weight}
