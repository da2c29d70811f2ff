"""Rollouts that go on during updates: no staleness is the synchronous loop, none is older than allowed,
nothing is lost or trained on twice, and what goes wrong ends the run with its state saved."""

import asyncio
import random
from collections import Counter
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM

from agent.engines.hf import HFEngine
from agent.trajectory import Segment, SegmentKind, StopReason, Trajectory
from agent.transcripts import from_record
from data.errors import ConfigError, RetrieverUnavailable, RunStopped
from data.jsonl import read_jsonl
from data.questions import load_questions
from data.run_dir import read_metrics, read_run
from retriever_server.client.search_client import SearchClient
from rl.algorithm.losses import sampler_weights
from rl.algorithm.presets import AlgorithmConfig
from rl.algorithm.rewards import combine
from rl.config import RolloutConfig
from rl.learner.learner import Learner
from rl.learner.workers import Workers
from rl.question_mix import draw_question
from rl.rollouts import Collected, Group, Rollouts, staleness
from scripts.train import train
from scripts.wiring import open_agent, open_client
from tests.fakes import question
from tests.samples import quick
from tests.toy import toy_config


class Killed(BaseException):
    """Ends a run as a kill does."""


def asynchronous(toy, out, max_staleness, **changes):
    """A run of the toy world that may be so stale; further fields of `rollout` by `rollout_NAME`."""
    given = {key.removeprefix("rollout_"): changes.pop(key) for key in list(changes) if "rollout_" in key}
    rollout = RolloutConfig(questions_per_step=3, group_size=4, max_staleness=max_staleness, **given)
    algorithm = AlgorithmConfig(learning_rate=4e-3, importance="token")
    return toy_config(toy, out, **{"rollout": rollout, "algorithm": algorithm, "steps": 8, **changes})


def weights(out, step):
    return AutoModelForCausalLM.from_pretrained(out / "checkpoints" / f"step-{step:06d}").state_dict()


def assert_same_weights(one, two):
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class Slow(SearchClient):
    """A client whose searches take up to `seconds`, each its own time; the first `lost` never come back."""

    def __init__(self, toy, seconds, fails=lambda number: False, lost=0):
        self.inner, self.seconds = open_client(str(toy / "index")), seconds
        self._retriever = self.inner._retriever
        self.fails, self.lost = fails, lost
        self.random, self.asked = random.Random(0), 0

    async def search(self, query, k):
        self.asked += 1
        number = self.asked
        await asyncio.sleep(1e6 if number <= self.lost else self.seconds * self.random.random())
        if self.fails(number):
            raise RetrieverUnavailable("nobody answers")
        return await self.inner.search(query, k)

    async def close(self):
        await self.inner.close()


@pytest.fixture
def trained(monkeypatch):
    """(trajectory, step) of all that reached the learner."""
    seen, update = [], Learner.learn

    def spy(self, collected, step):
        seen.extend((trajectory, step) for group in collected.groups for trajectory in group.trajectories)
        return update(self, collected, step)

    monkeypatch.setattr(Learner, "learn", spy)
    return seen


def test_no_staleness_is_the_synchronous_loop_bit_for_bit(toy, tmp_path):
    """Written out: draw, roll out, reward, learn, give the engine the weights."""
    config = asynchronous(toy, tmp_path, 0, steps=4)
    train(config)
    opened = open_agent(config.policy, config.retriever, config.protocol, 1.0, 128, "cpu")
    learner = Learner(opened.policy, config, opened.agent.protocol, Workers())
    questions, reward = load_questions(config.questions), combine(config.rewards)

    async def loop():
        async with opened.client:
            for step in range(4):
                numbers = range(3 * step, 3 * step + 3)
                asked = [draw_question(questions, n, 0) for n in numbers for _ in range(4)]
                keys = [4 * n + member for n in numbers for member in range(4)]
                rolled = await opened.agent.rollout(asked, 0, keys=keys)
                rewards = reward(rolled)
                groups = [Group(i, rolled[4 * i :][:4], rewards[4 * i :][:4]) for i in range(3)]
                learner.learn(Collected(groups, 3, 3, {}), step)
                await opened.agent.engine.update_weights(None, step + 1)

    asyncio.run(loop())
    assert_same_weights(weights(tmp_path, 4), opened.policy.model.state_dict())


@pytest.mark.slow
def test_the_same_asynchronous_run_comes_again_where_nothing_waits(toy, tmp_path, trained):
    for run in ("one", "two"):
        train(asynchronous(toy, tmp_path / run, 2))
    assert any(staleness(trajectory, step) > 0 for trajectory, step in trained)
    assert_same_weights(weights(tmp_path / "one", 8), weights(tmp_path / "two", 8))


@pytest.mark.parametrize("bound", quick([2], [1, 2, 4]))
def test_what_is_stale_is_corrected_measured_and_never_older_than_the_bound(
    toy, tmp_path, trained, bound, monkeypatch
):
    weighed = []

    def spy(kind, cap, old, sampler, row, sampled):
        weighed.append((old, sampler, sampler_weights(kind, cap, old, sampler, row, sampled)))
        return weighed[-1][-1]

    monkeypatch.setattr("rl.algorithm.losses.sampler_weights", spy)
    train(asynchronous(toy, tmp_path, bound, deterministic=False), Slow(toy, 0.02))
    lags = [
        step - min(s.weights_version for s in t.segments if s.kind is SegmentKind.POLICY)
        for t, step in trained
    ]
    assert 0 < max(lags) <= bound
    rows = read_metrics(tmp_path)
    assert [row["rollout/staleness"] for row in rows] == pytest.approx(
        [sum(lags[12 * i : 12 * i + 12]) / 12 for i in range(8)]
    )
    stale = [row for row in rows if row["rollout/staleness"] > 0 and "policy/sampler_k3" in row]
    assert any(row["policy/sampler_difference"] > 1e-3 for row in stale)
    assert any(abs(row["policy/importance_weight"] - 1) > 1e-6 for row in stale)
    for old, sampler, weights in weighed:  # trainer / sampler, at most the cap of 2
        torch.testing.assert_close(weights, (old - sampler).exp().clamp(max=2))
    assert set(Counter(trajectory.question.id for trajectory, _ in trained).values()) == {8}  # two epochs


def test_the_correction_decides_what_stale_tokens_teach(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "rl.algorithm.losses.sampler_weights", lambda kind, cap, old, *_: torch.zeros_like(old)
    )
    train(asynchronous(toy, tmp_path, 2, steps=4))
    began = AutoModelForCausalLM.from_pretrained(toy / "policy").state_dict()
    assert_same_weights(weights(tmp_path, 4), began)


class Scripted:
    """An agent whose trajectories take so many turns of the event loop, and whose weights have a version."""

    def __init__(self, turns):
        self.turns, self.version, self.alive, self.most = turns, 0, 0, 0

    async def rollout(self, questions, seed, on_finished, keys, ledgers):
        async def one(index, asked):
            self.alive += 1
            self.most = max(self.most, self.alive)
            written = Segment(SegmentKind.POLICY, [1], "", [-1.0], self.version)
            for _ in range(self.turns(keys[index])):
                await asyncio.sleep(0)
            self.alive -= 1
            on_finished(index, Trajectory(asked, [written], StopReason.ANSWERED, str(keys[index])))

        await asyncio.gather(*(one(index, asked) for index, asked in enumerate(questions)))


def scripted_run(toy, tmp_path, bound, turns, steps=30, rank=0, count=1):
    """The answers of each step, which are the trajectories' keys, and their lags; and the agent."""
    config = asynchronous(toy, tmp_path, bound, steps=steps, rollout_deadline_seconds=20)
    agent, steps_taken = Scripted(turns), []
    asked = [question(str(number)) for number in range(1000)]

    class Part(Workers):
        def gather(self, value):
            return [value]

    async def run():
        rollouts = Rollouts(cast(Any, agent), asked, combine({"em": 1.0}), config, Part(rank, count))
        for step in range(steps):
            collected = await rollouts.collect(step)
            found = [trajectory for group in collected.groups for trajectory in group.trajectories]
            steps_taken.append([(int(t.answer or ""), staleness(t, step)) for t in found])
            await asyncio.sleep(0)
            agent.version = step + 1
        await rollouts.close()

    asyncio.run(run())
    return steps_taken, agent


@pytest.mark.parametrize("bound", range(6))
@pytest.mark.parametrize(("rank", "count"), [(0, 1), (0, 2), (1, 2)])
def test_in_whatever_order_trajectories_finish_all_are_trained_on_in_time(toy, tmp_path, bound, rank, count):
    delays = random.Random(bound)
    steps, agent = scripted_run(
        toy, tmp_path, bound, lambda key: delays.choice([0, 1, 5, 40, 200]), 30, rank, count
    )
    lags = [lag for step in steps for _, lag in step]
    assert max(lags) <= bound and (bound == 0) == (max(lags) == 0)
    share = len(range(rank, 3, count))
    expected = {number * 4 + at for number in range(90) if number % 3 % count == rank for at in range(4)}
    found = [key for step in steps for key, _ in step]
    assert len(found) == len(set(found)) == 30 * share * 4
    assert len(expected - set(found)) <= 4 * 3 * bound  # the last steps leave some that straggle
    assert agent.most <= 4 * share * (bound + 1)


def test_a_straggler_is_trained_on_later_and_the_others_do_not_wait(toy, tmp_path):
    steps, _ = scripted_run(toy, tmp_path, 2, lambda key: 10_000 if key == 13 else 1, steps=6)
    straggler = next(at for at, step in enumerate(steps) if 13 in dict(step))
    assert straggler == 2 and dict(steps[2])[13] == 2  # begun for the second step, and now due
    assert sorted(dict(steps[1])) == list(range(16, 28))  # its group let a later one go first


def test_a_killed_run_goes_on_with_what_was_in_flight(toy, tmp_path, trained):
    def kill(step):
        if step == 4:
            raise Killed

    config = asynchronous(toy, tmp_path, 4, deterministic=False, save_every=4)
    with pytest.raises(Killed):
        train(config, Slow(toy, 0.05), on_step=kill)
    folder = tmp_path / "checkpoints" / "step-000004"
    kept = [member for group in read_jsonl(folder / "in_flight.jsonl") for member in group["members"]]
    whole = [from_record(member).token_ids for member in kept if member["finished"]]
    begun = len(trained)
    train(config, Slow(toy, 0.05))
    again = [trajectory for trajectory, _ in trained[begun:]]
    assert len(again) == 48 and len(kept) == 36 and whole
    assert all(tokens in [trajectory.token_ids for trajectory in again] for tokens in whole)
    assert set(Counter(trajectory.question.id for trajectory, _ in trained).values()) == {8}
    assert max(staleness(trajectory, step) for trajectory, step in trained) <= 4
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 9))


def test_what_no_longer_fits_is_dropped_with_a_warning(toy, tmp_path, caplog):
    config = asynchronous(toy, tmp_path, 2, steps=6, save_every=2)

    def kill(step):
        if step == 2:
            raise Killed

    with pytest.raises(Killed):
        train(config, on_step=kill)
    train(replace(config, rollout=replace(config.rollout, group_size=2), resume=True))
    assert "the configuration has changed: 3 groups in flight are dropped" in caplog.text


def failing_engine(monkeypatch, after):
    forward, calls = HFEngine._forward, []

    def broken(self, *given):
        calls.append(1)
        if len(calls) > after:
            raise RuntimeError("out of memory")
        return forward(self, *given)

    monkeypatch.setattr(HFEngine, "_forward", broken)


@pytest.mark.slow
@pytest.mark.parametrize("bound", [0, 2])
def test_what_breaks_stops_the_run_with_its_state_saved_and_it_goes_on(toy, tmp_path, monkeypatch, bound):
    """An engine that dies, a search that never ends, a retriever that is gone; nothing is lost."""
    config = asynchronous(toy, tmp_path, bound, steps=12, deterministic=False, rollout_max_failed_share=0)
    hurried = replace(config, rollout=replace(config.rollout, deadline_seconds=1.0), resume=True)
    said = r"start the same command again to go on"
    with monkeypatch.context() as patched:
        failing_engine(patched, 60)
        with pytest.raises(RunStopped, match=rf"process 0 ended: engine hf: RuntimeError: out of .*{said}"):
            train(config, Slow(toy, 0.01))
    with pytest.raises(RunStopped, match=rf"no trajectories for 1 s \(rollout.deadline_seconds\); .*{said}"):
        train(hurried, Slow(toy, 0.01, lost=4))
    with pytest.raises(RunStopped, match=rf"searches or rewards failed in .*nobody answers\); .*{said}"):
        train(replace(config, resume=True), Slow(toy, 0.01, fails=lambda number: number > 20))
    assert read_run(tmp_path)["status"] == "stopped"
    done = len(read_metrics(tmp_path))
    assert (tmp_path / "checkpoints" / f"step-{done:06d}").exists() and done < 12
    train(config, Slow(toy, 0.01))
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(row["stop/search_failed"] == 0 and row["rollout/groups"] == 3 for row in rows)


def test_what_is_stale_needs_the_correction(toy, tmp_path):
    with pytest.raises(ConfigError, match=r"max_staleness = 1: must be 0 with algorithm.importance none"):
        asynchronous(toy, tmp_path, 1, algorithm=AlgorithmConfig())
