"""Each way a run collapses raises its alarm; a healthy run, however noisy, raises none."""

import math
import random

import pytest

from data.run_dir import RunDir, read_metrics
from rl.algorithm.presets import AlgorithmConfig
from rl.config import SentinelConfig
from rl.learner.learner import Learner
from rl.sentinel import Sentinel, Verdict
from scripts.train import train
from tests.toy import toy_config

HEALTHY = {
    "policy/entropy": 0.8,
    "rollout/valid_format": 0.9,
    "policy/correct_logprob": -0.4,
    "policy/grad_norm": 0.3,
    "policy/sampler_difference": 0.004,
    "policy/loss": 0.01,
}


def healthy_run(steps, seed=0):
    """Rows of a run that learns: the entropy falls to a third, answers get likelier, all of it noisily."""
    draw = random.Random(seed)
    rows = []
    for step in range(1, steps + 1):
        done = step / steps
        row = {
            "step": step,
            "policy/entropy": (0.8 - 0.5 * done) * draw.lognormvariate(0, 0.25),
            "rollout/valid_format": min(1.0, (0.8 + 0.15 * done) * draw.gauss(1, 0.06)),
            "policy/grad_norm": 0.3 * draw.lognormvariate(0, 0.6),
            "policy/sampler_difference": 0.004 * draw.lognormvariate(0, 0.5),
            "policy/loss": draw.gauss(0, 0.1),
        }
        if draw.random() < 0.9:  # else no answer was correct
            row["policy/correct_logprob"] = -0.4 * (1.2 - done) * draw.lognormvariate(0, 0.3)
        if draw.random() < 0.05:  # no group had anything to learn from
            row = {"step": step, "rollout/valid_format": row["rollout/valid_format"], "policy/grad_norm": 0.0}
        rows.append(row)
        if step % 20 == 0:
            rows.append({"step": step, "dev/em": 0.5})
    return rows


def watch_all(sentinel, rows):
    return [sentinel.watch(row["step"], row) for row in rows]


def baseline(config):
    rows = [{"step": step, **HEALTHY} for step in range(1, config.baseline_steps + 1)]
    return Sentinel(config, rows), len(rows)


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_noisy_run_raises_no_alarm(seed):
    verdicts = watch_all(Sentinel(SentinelConfig(action="stop")), healthy_run(200, seed))
    assert [line for verdict in verdicts for line in verdict.alarms] == []


@pytest.mark.parametrize(
    ("key", "drift", "said"),
    [
        ("policy/entropy", lambda n: 0.8 * 0.8**n, "below 0.08 (min_entropy_share 0.1, baseline 0.8)"),
        ("policy/entropy", lambda n: 0.8 * 1.2**n, "above 4 (max_entropy_share 5, baseline 0.8)"),
        ("rollout/valid_format", lambda n: 0.9 - 0.05 * n, "below 0.45 (min_valid_share 0.5, baseline 0.9)"),
        (
            "policy/correct_logprob",
            lambda n: -0.4 - 0.1 * n,
            "below -1.4 (max_correct_logprob_fall 1, baseline -0.4)",
        ),
        ("policy/grad_norm", lambda n: 0.3 * 1.5**n, "above 6 (max_grad_norm_ratio 20, baseline 0.3)"),
        ("policy/sampler_difference", lambda n: 0.01 * n, "above 0.1 (max_sampler_difference 0.1)"),
    ],
)
def test_a_drift_warns_at_its_bound_and_stops_the_run_when_it_lasts(key, drift, said):
    sentinel, start = baseline(SentinelConfig(action="stop"))
    verdicts = [sentinel.watch(start + n, {**HEALTHY, key: drift(n)}) for n in range(18)]
    first = next(n for n, verdict in enumerate(verdicts) if verdict.alarms)
    value = f"{drift(first):.4g}"
    assert verdicts[first].alarms == [f"step {start + first}: {key} {value} is {said}"]
    assert [verdict.action for verdict in verdicts[: first + 3]] == [None] * first + ["warn", "warn", "stop"]


@pytest.mark.parametrize(
    ("field", "value", "key", "bound"),
    [
        ("min_entropy_share", 0.5, "policy/entropy", 0.4),
        ("max_entropy_share", 2.0, "policy/entropy", 1.6),
        ("min_valid_share", 0.9, "rollout/valid_format", 0.81),
        ("max_correct_logprob_fall", 0.25, "policy/correct_logprob", -0.65),
        ("max_grad_norm_ratio", 3.0, "policy/grad_norm", 0.9),
        ("max_sampler_difference", 0.01, "policy/sampler_difference", 0.01),
    ],
)
def test_a_bound_is_where_it_is_set_and_no_alarm_lies_on_it(field, value, key, bound):
    inside, outside = (1e-6, -1e-6) if field.startswith("min") or "fall" in field else (-1e-6, 1e-6)
    for far, alarmed in ((inside, False), (outside, True)):
        sentinel, start = baseline(SentinelConfig(**{field: value}))
        verdict = sentinel.watch(start + 1, {**HEALTHY, key: bound + far})
        assert [line for line in verdict.alarms if field in line] == (verdict.alarms if alarmed else [])
        assert bool(verdict.alarms) == alarmed
    exact, start = baseline(SentinelConfig(max_sampler_difference=0.5))
    assert not exact.watch(start + 1, {**HEALTHY, "policy/sampler_difference": 0.5}).alarms


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_an_action_is_taken_when_patience_ends(patience):
    sentinel, start = baseline(SentinelConfig(action="stop", patience=patience))
    actions = [sentinel.watch(start + n, {**HEALTHY, "policy/entropy": 0.0}).action for n in range(10)]
    assert [n + 1 for n, action in enumerate(actions) if action == "stop"] == list(
        range(patience, 11, patience)
    )


@pytest.mark.parametrize("steps", [1, 4])
def test_the_baseline_is_the_median_of_so_many_first_steps(steps):
    """Steps in which there was something to measure; the first that has a baseline is judged by it."""
    sentinel = Sentinel(SentinelConfig(baseline_steps=steps))
    values = [0.0, 1.0, 2.0, 30.0, 4.0][: steps + 1]
    for step, value in enumerate(values):
        assert sentinel.watch(step, {"policy/grad_norm": value}).alarms == []
    middle = {1: 1.0, 4: 3.0}[steps]
    assert sentinel.watch(6, {"policy/grad_norm": 20 * middle}).alarms == []
    (line,) = sentinel.watch(7, {"policy/grad_norm": 20 * middle + 1}).alarms
    assert line.endswith(f"baseline {middle:g})")


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
@pytest.mark.parametrize("key", HEALTHY)
def test_a_metric_that_is_no_number_is_an_alarm_even_in_the_first_step(key, value):
    verdict = Sentinel(SentinelConfig(patience=1, action="roll_back")).watch(1, {**HEALTHY, key: value})
    assert verdict.alarms == [f"step 1: {key} is {value}: not a finite number"]
    assert verdict.action == "roll_back"


def test_a_healthy_step_begins_the_count_anew_but_one_that_says_nothing_does_not():
    sentinel, start = baseline(SentinelConfig(action="stop", patience=2))
    collapsed = {**HEALTHY, "policy/entropy": 0.01}
    nothing = {"rollout/valid_format": 0.9}
    steps = [collapsed, HEALTHY, collapsed, nothing, {"dev/em": 0.1}, collapsed, collapsed]
    actions = [sentinel.watch(start + n, step).action for n, step in enumerate(steps)]
    assert actions == ["warn", None, "warn", None, None, "stop", "warn"]


def test_without_an_action_it_only_ever_warns():
    sentinel, start = baseline(SentinelConfig())
    actions = [sentinel.watch(start + n, {**HEALTHY, "policy/entropy": 0.0}).action for n in range(9)]
    assert actions == ["warn"] * 9


def test_steps_with_nothing_to_learn_are_no_baseline_of_the_gradient_norm():
    rows = [{"step": n, "policy/grad_norm": 0.0} for n in range(1, 20)]
    rows += [{"step": n, "policy/grad_norm": 0.3} for n in range(20, 30)]
    sentinel = Sentinel(SentinelConfig(), rows)
    assert sentinel.watch(30, {"policy/grad_norm": 5.9}).alarms == []
    assert sentinel.watch(31, {"policy/grad_norm": 6.1}).alarms != []


def test_built_from_the_metrics_on_disk_it_judges_as_if_it_had_watched(tmp_path):
    rows = healthy_run(40)
    for n, row in enumerate(rows[25:]):
        row["policy/entropy"] = 0.05 if n % 5 else math.nan
    config = SentinelConfig(action="roll_back")
    watching = Sentinel(config)
    with RunDir(tmp_path, {}) as run:
        for n, row in enumerate(rows):
            step, metrics = row["step"], {k: v for k, v in row.items() if k != "step"}
            rebuilt = Sentinel(config, read_metrics(tmp_path)).watch(step, metrics)
            watched = watching.watch(step, metrics)
            assert (n, rebuilt) == (n, watched)
            run.log(step, metrics)
    assert watched.alarms


def test_what_needs_no_baseline_alarms_from_the_first_step():
    row = HEALTHY | {"policy/sampler_difference": 9.0, "policy/entropy": 1e-9}
    (alarm,) = Sentinel(SentinelConfig()).watch(1, row).alarms
    assert "policy/sampler_difference 9 is above" in alarm


def test_an_alarm_switches_llds_on_and_it_stays_on_after_a_resume(toy, tmp_path, monkeypatch):
    two_updates = AlgorithmConfig(updates_per_rollout=2)
    config = toy_config(
        toy,
        tmp_path,
        steps=3,
        save_every=1,
        algorithm=two_updates,
        sentinel=SentinelConfig(action="preserve", preserve_coefficient=0.3),
    )
    alarms = {1: Verdict(["collapse"], "preserve")}
    monkeypatch.setattr(Sentinel, "watch", lambda self, step, _: alarms.get(step, Verdict([], None)))
    given, learn = [], Learner.learn

    def noting(self, collected, step):
        given.append((step, self.config.algorithm.llds_coefficient))
        return learn(self, collected, step)

    monkeypatch.setattr(Learner, "learn", noting)

    def stop(step):
        if step == 2:
            raise GeneratorExit  # nothing of it is caught

    with pytest.raises(GeneratorExit):
        train(config, on_step=stop)
    train(config)
    assert sorted(set(given)) == [(0, 0.0), (1, 0.3), (2, 0.3)]
