"""Trajectories of a step: which groups are drawn, kept, replaced and counted, in one process or two."""

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from statistics import pstdev
from typing import Any, ClassVar, cast

import pytest

from agent.trajectory import Ledger, Picture, SearchRecord, Segment, SegmentKind, StopReason, Trajectory
from data.errors import RunStopped
from data.records import Hit, Passage, Question
from rl.algorithm.presets import AlgorithmConfig
from rl.algorithm.rewards import Reward
from rl.config import RolloutConfig, TrainConfig
from rl.learner.workers import Workers, averages
from rl.question_mix import draw_question
from rl.rollouts import Collected, Group, Rollouts, is_mixed, staleness, totals_of

WANTED, SIZE = 3, 2
QUESTIONS = [Question(str(number), f"q {number}?", ("right",)) for number in range(10)]
ORDER = [draw_question(QUESTIONS, number, 0).id for number in range(20)]


class Agent:
    """Writes one token for each question: no search, no model. Remembers the seeds and keys."""

    def __init__(self, stop=lambda number: StopReason.ANSWERED):
        self.stop, self.keys, self.seeds = stop, [], []

    async def rollout(
        self, questions: Sequence[Question], seed, on_finished, keys, ledgers: Sequence[Ledger]
    ):
        self.keys += keys
        self.seeds.append(seed)
        for index, (asked, key) in enumerate(zip(questions, keys, strict=True)):
            stop = self.stop(key)
            error = "no retriever" if stop is StopReason.SEARCH_FAILED else None
            written = Segment(SegmentKind.POLICY, [1], "", [-1.0])
            search = SearchRecord("q", [], 0.0, error)
            on_finished(index, Trajectory(asked, [written], stop, str(key), [search]))


def make_config(rounds=0, **rollout) -> TrainConfig:
    sizes: dict[str, Any] = {"questions_per_step": WANTED, "group_size": SIZE, "max_failed_share": 1.0}
    algorithm = AlgorithmConfig(dynamic_sampling_rounds=rounds, importance="token")
    return TrainConfig("p", "q", "r", "o", rollout=RolloutConfig(**sizes | rollout), algorithm=algorithm)


def rewarded(flat=(), broken=()):
    """Rewards by the key of a trajectory: 0 and 1 in turn, but in flat groups; some fail."""

    def reward(trajectories):
        keys = [int(t.answer) for t in trajectories]
        return [
            Reward([float(k // SIZE not in flat and k % SIZE)], {}, "judge: gone" if k in broken else None)
            for k in keys
        ]

    return reward


def collect(config, reward, agent=None, steps=1, workers: Workers | None = None) -> list[Collected]:
    async def run():
        made = Rollouts(cast(Any, agent or Agent()), QUESTIONS, reward, config, workers or Workers())
        found = [await made.collect(step) for step in range(steps)]
        await made.close()
        return found

    return asyncio.run(run())


def members(collected: Collected) -> list[tuple[int, list[int]]]:
    """The number of each group, and the keys of its trajectories."""
    return [(g.number, [int(t.answer or "") for t in g.trajectories]) for g in collected.groups]


def test_questions_come_in_their_order_and_every_member_has_a_key_of_its_own():
    agent = Agent()
    steps = collect(make_config(), rewarded(), agent, steps=4)
    assert agent.keys == list(range(4 * WANTED * SIZE)) and set(agent.seeds) == {0}
    for step, found in enumerate(steps):
        first = step * WANTED
        assert members(found) == [(n, [SIZE * (first + n), SIZE * (first + n) + 1]) for n in range(WANTED)]
        assert [g.trajectories[0].question.id for g in found.groups] == ORDER[first : first + WANTED]
        assert [[r.total for r in g.rewards] for g in found.groups] == [[0.0, 1.0]] * WANTED
        assert (found.count, found.drawn) == (WANTED, WANTED)


def test_a_group_with_a_failed_search_or_reward_is_no_group():
    agent = Agent(lambda key: StopReason.SEARCH_FAILED if key == 3 else StopReason.ANSWERED)
    first, second = collect(make_config(), rewarded(broken=[4]), agent, steps=2)
    assert members(first) == [(0, [0, 1])] and (first.count, first.drawn) == (1, 3)
    assert len(members(second)) == WANTED
    assert averages([first.totals])["stop/search_failed"] == pytest.approx(1 / 6)  # of all, used or not


class Swapped(Agent):
    """The retriever is swapped within the first trajectories of group 1, so many times as `swaps`."""

    def __init__(self, swaps):
        super().__init__()
        self.left, self.generation = swaps, 0

    async def rollout(
        self, questions: Sequence[Question], seed, on_finished, keys, ledgers: Sequence[Ledger]
    ):
        self.keys += keys
        for index, (asked, key) in enumerate(zip(questions, keys, strict=True)):
            await asyncio.sleep(0)
            if key == SIZE + 1 and self.left:
                self.left, self.generation = self.left - 1, self.generation + 1
            hit = Hit(Passage("p", "t"), 1.0, f"g{self.generation}")
            written = Segment(SegmentKind.POLICY, [1], "", [-1.0])
            search = SearchRecord("q", [hit], 0.0)
            on_finished(index, Trajectory(asked, [written], StopReason.ANSWERED, str(key), [search]))


@pytest.mark.parametrize(("swaps", "kept", "begun"), [(0, 3, 6), (1, 3, 8), (2, 3, 10), (9, 2, 10)])
def test_no_group_holds_two_generations_of_the_retriever(swaps, kept, begun, caplog):
    agent = Swapped(swaps)
    (found,) = collect(make_config(), rewarded(), agent)
    assert len(found.groups) == kept and len(agent.keys) == begun
    assert not any(is_mixed(group.trajectories) for group in found.groups)
    assert [r.message for r in caplog.records] == [
        "group 1 met a swap of the retriever: it is rolled out anew"
    ] * min(swaps, 2)


def test_several_generations_are_logged_where_they_are_allowed():
    (found,) = collect(make_config(mixed_generations=True), rewarded(), Swapped(1))
    assert len(found.groups) == 3 and averages([found.totals])["rollout/mixed_generations"] == pytest.approx(
        1 / 3
    )


def test_flat_groups_stay_where_they_are_not_to_be_replaced():
    (found,) = collect(make_config(), rewarded(flat=[0, 2]))
    assert [number for number, _ in members(found)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("rounds", "flat", "chosen", "drawn"),
    [
        (1, [], [0, 1, 2], 3),  # nothing to replace: no further round
        (1, [1], [0, 2, 3], 6),  # two of the second round are too many
        (5, [0, 1, 2, 4, 5], [3, 6, 7], 9),
        (1, [0, 1, 2, 4], [3, 5], 6),  # the rounds are over
        (2, range(9), [], 9),
    ],
)
def test_flat_groups_are_replaced_by_further_questions_for_some_rounds(rounds, flat, chosen, drawn):
    agent = Agent()
    found, after = collect(make_config(rounds), rewarded(flat), agent, steps=2)
    assert members(found) == [(at, [SIZE * n, SIZE * n + 1]) for at, n in enumerate(chosen)]
    assert (found.count, found.drawn) == (len(chosen), drawn)
    assert averages([found.totals])["rollout/zero_variance_groups"] == sum(n < drawn for n in flat) / drawn
    assert after.groups[0].trajectories[0].question.id == ORDER[drawn]
    assert sorted(agent.keys) == list(range(SIZE * (drawn + after.drawn)))


class Two(Workers):
    """One of two processes that are threads here."""

    barrier = threading.Barrier(2)
    shared: ClassVar[list[Any]] = [None, None]

    def gather(self, value):
        self.shared[self.rank] = value
        self.barrier.wait(30)
        found = list(self.shared)
        self.barrier.wait(30)
        return found


@pytest.mark.parametrize("flat", [[], [0, 2, 3], [0, 1, 2, 3, 4]])
def test_two_processes_collect_what_one_does(flat):
    def run(rank):
        found[rank] = collect(make_config(2), rewarded(flat), steps=3, workers=Two(rank, 2))

    found: dict[int, list[Collected]] = {}
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for alone, *parts in zip(
        collect(make_config(2), rewarded(flat), steps=3), found[0], found[1], strict=True
    ):
        assert sorted(members(parts[0]) + members(parts[1])) == members(alone)
        assert all((part.count, part.drawn) == (alone.count, alone.drawn) for part in parts)
        assert averages([part.totals for part in parts]) == averages([alone.totals])


def test_more_failures_than_allowed_stop_the_run_by_their_reason_and_just_so_many_do_not():
    def failing(count):
        return Agent(lambda key: StopReason.SEARCH_FAILED if key < count else StopReason.ANSWERED)

    config = make_config(max_failed_share=0.5)
    assert collect(config, rewarded(), failing(3))[0].count == 1
    said = r"^searches or rewards failed in 4 of 6 trajectories \(allowed: 50%; no retriever\); the state "
    with pytest.raises(RunStopped, match=said):
        collect(config, rewarded(), failing(4))
    with pytest.raises(RunStopped, match=r"failed in 4 of 6 .*judge: gone"):
        collect(config, rewarded(broken=[0, 1, 2, 5]))


def written(*turns, answer: str | None = "right", stop=StopReason.ANSWERED, searches=0, **more):
    """A trajectory of a prompt of two tokens and turns of log-probs, an observation of three after each."""
    segments = [Segment(SegmentKind.PROMPT, [1, 2], "")]
    for number, logprobs in enumerate(turns):
        version = 5 - number
        segments.append(Segment(SegmentKind.POLICY, [7] * len(logprobs), "", logprobs, version))
        segments.append(Segment(SegmentKind.OBSERVATION, [8, 8, 8], "", [-9.0] * 3, 1))
    records = [SearchRecord("q", [], 0.0)] * searches
    return Trajectory(QUESTIONS[0], segments, stop, answer, records, **more)


def test_the_numbers_of_a_step_are_sums_and_counts_over_its_trajectories():
    first = Group(
        0,
        [
            written([-1.0, -2.0], [-3.0], searches=2, valid_format=True),
            written([-4.0], answer="wrong", searches=1, invalid_actions=2),
        ],
        [Reward([0.0, 1.5], {"em": 1.0, "format": 0.5}), Reward([0.25], {"em": 0.0, "format": 0.25})],
    )
    second = Group(
        1,
        [
            written([-0.5, None], valid_format=True),
            written(answer=None, stop=StopReason.TOKEN_LIMIT),
        ],
        [Reward([0.75], {"em": 1.0, "format": 0.75}), Reward([9.0], {}, "judge: gone")],
    )
    flat = Group(
        2,
        [written([-1.0], answer="Right"), written([-2.0], answer="x")],
        [Reward([0.5], {"em": 1.0, "format": 0.0})] * 2,
    )
    totals = totals_of([first, second, flat])
    stops = {f"stop/{reason}": (0.0, 6.0) for reason in StopReason}
    assert totals == {
        "reward/mean": (1.5 + 0.25 + 0.75 + 0.5 + 0.5, 5.0),
        "reward/em": (4.0, 5.0),
        "reward/format": (1.5, 5.0),
        "reward/group_std": (pytest.approx(pstdev([1.5, 0.25]) + pstdev([0.75, 9.0])), 3.0),
        "rollout/zero_variance_groups": (1.0, 3.0),
        "rollout/em": (3.0, 6.0),
        "rollout/searches": (3.0, 6.0),
        "rollout/valid_format": (2.0, 6.0),
        "rollout/invalid_actions": (2.0, 6.0),
        "rollout/policy_tokens": (3.0 + 1 + 2 + 0 + 1 + 1, 6.0),
        "rollout/total_tokens": (6 * 2 + 6 * 3 + 8.0, 6.0),
        **stops,
        "stop/answered": (5.0, 6.0),
        "stop/token_limit": (1.0, 6.0),
        # Of right answers alone, and of what the policy sampled.
        "policy/correct_logprob": (-1.0 - 2 - 3 - 0.5 - 1, 5.0),
    }
    assert totals_of([])["reward/mean"] == (0.0, 0.0)
    tokyo = replace(QUESTIONS[0], gold_answers=("東京",), metadata={"normalizer": "unicode"})
    one = replace(written([-1.0], answer="「東京」"), question=tokyo)
    assert totals_of([Group(0, [one], [Reward([1.0], {})])])["rollout/em"] == (1.0, 1.0)


def test_pictures_are_counted_where_any_was_shown():
    shown = written([-1.0])
    shown.segments[2] = Segment(
        SegmentKind.OBSERVATION, [8] * 3, "", pictures=(Picture("a", 0, 1), Picture("b", 1, 2))
    )
    group = Group(0, [shown, written([-1.0])], [Reward([1.0], {})] * 2)
    assert totals_of([group])["rollout/pictures"] == (2.0, 2.0)


def test_metrics_of_processes_are_averaged_by_their_weights_and_what_nobody_measured_is_left_out():
    parts = [{"a": (1.0, 1.0), "b": (0.0, 0.0)}, {"a": (2.0, 5.0), "c": (3.0, 2.0)}]
    assert averages(parts) == {"a": 0.5, "c": 1.5}


def test_staleness_is_that_of_the_oldest_weights_that_wrote():
    assert (
        staleness(written([-1.0], [-1.0], [-1.0]), 9) == 6
    )  # by versions 5, 4 and 3, not the observations' 1
    assert staleness(written(), 9) == 0


def test_the_mean_staleness_of_all_that_was_drawn_is_logged_where_it_may_be_any():
    steps = collect(make_config(max_staleness=2), rewarded(), steps=3)
    assert [found.totals["rollout/staleness"] for found in steps] == [(6.0 * lag, 6.0) for lag in range(3)]
    assert "rollout/staleness" not in collect(make_config(), rewarded())[0].totals
