"""A run that can learn nothing says so, with the cause and a command that runs; others say nothing."""

import logging
import re
import shlex
from dataclasses import replace

import pytest

from data.run_dir import read_metrics
from rl.config import AlgorithmConfig, RolloutConfig, TrainConfig
from rl.diagnosis import WINDOW, conclude, find_obstacle
from scripts import __main__ as sleuth
from scripts import warm_start
from scripts.command_line import known_parser, parse
from scripts.train import train
from tests.toy import bigram_policy, toy_config

FINE = {
    "step": 1,
    "reward/mean": 0.3,
    "reward/group_std": 0.2,
    "rollout/valid_format": 0.9,
    "rollout/searches": 1.2,
    "rollout/invalid_actions": 0.1,
    "rollout/zero_variance_groups": 0.4,
    "rollout/em": 0.3,
    "stop/answered": 0.9,
    "stop/token_limit": 0.0,
    "policy/grad_norm": 0.8,
}
ZERO = {"reward/mean": 0.0, "reward/group_std": 0.0, "rollout/em": 0.0, "rollout/zero_variance_groups": 1.0}


def config(**changes):
    values = {"policy": "a policy", "questions": "q", "retriever": "r", "out": "runs/it is/here/"}
    return TrainConfig(**values | changes)


@pytest.mark.parametrize(
    ("changed", "name", "words"),
    [
        ({}, None, ()),
        (
            {"rollout/valid_format": 0.0, "rollout/invalid_actions": 2.0},
            "no valid format",
            ["has not learned to speak it", "sleuth warm-start"],
        ),
        (
            {"rollout/valid_format": 0.0, "stop/token_limit": 0.8},
            "no valid format",
            ["context is full", "--protocol.max_context_tokens"],
        ),
        (
            {"rollout/valid_format": 0.0, "rollout/searches": 4.0, "rollout/invalid_actions": 0.0},
            "no valid format",
            ["never answers", "--protocol.max_turns"],
        ),
        (
            {"rollout/searches": 0.0},
            "no search",
            ["from memory", "gold_passage", "sleuth warm-start"],
        ),
        (ZERO, "no reward", ["every reward is 0 (em)", "--rewards '{f1: 1.0}'", "sleuth warm-start"]),
        ({**ZERO, "stop/answered": 0.1}, "no reward", ["does not come to an answer (10% of"]),
        ({**ZERO, "rollout/em": 0.25}, "no reward", ["do not pay what is right (EM 0.250)"]),
        ({"rollout/zero_variance_groups": 1.0}, "flat groups", ["--rollout.group_size 16"]),
        ({"rollout/zero_variance_groups": 1.0, "rollout/em": 1.0}, "solved", ["harder questions"]),
        ({"policy/grad_norm": 0.0}, "no gradient", ["all advantages are 0"]),
        ({"reward/mean": None, "policy/grad_norm": None}, None, ()),  # NaN, as it is read back
    ],
)
def test_each_obstacle_is_named_with_its_cause_and_what_to_do(changed, name, words):
    found = find_obstacle([{**FINE, **changed}] * 3, config(), "search_r1")
    assert (found and found.name) == name
    assert all(word in str(found) for word in words)


@pytest.mark.parametrize("changed", [{"rollout/valid_format": 0.0}, {"rollout/searches": 0.0}, ZERO])
def test_one_step_that_is_fine_is_enough(changed):
    assert find_obstacle([{**FINE, **changed}] * 9 + [FINE], config(), "compact") is None
    assert find_obstacle([], config(), "compact") is None


def test_groups_mean_nothing_to_an_algorithm_that_compares_none():
    ppo = config(algorithm=AlgorithmConfig(advantage="gae"), rollout=RolloutConfig(group_size=1))
    flat = [{**FINE, "rollout/zero_variance_groups": 1.0, "reward/group_std": 0.0}]
    assert find_obstacle(flat, ppo, "compact") is None
    assert find_obstacle([{**FINE, **ZERO}], ppo, "compact").name == "no reward"


def test_without_a_retriever_no_search_is_missed():
    assert find_obstacle([{**FINE, "rollout/searches": 0.0}], config(retriever="none"), "compact") is None


@pytest.mark.parametrize("changed", [{"rollout/valid_format": 0.0}, {"rollout/searches": 0.0}, ZERO])
def test_the_command_that_is_named_is_one(changed):
    said = str(find_obstacle([{**FINE, **changed}], config(policy="p/q r"), "search_r1"))
    _, name, *options = shlex.split(re.search("`(sleuth .*?)`", said)[1])
    given = parse(known_parser(warm_start.main, f"sleuth {name}"), options)
    assert name == "warm-start" and given["invented"] > 0 and given["protocol"].name == "search_r1"
    assert (given["policy"], given["out"]) == ("p/q r", "runs/it is/here-warm")


def test_the_conclusion_says_what_changed_or_what_stood_in_the_way():
    rows = [{**FINE, "step": i, "reward/mean": 0.1 * i} for i in range(1, 10)]
    rows[3:3] = [{"step": 4, "dev/em": 0.25}]
    rows += [{"step": 9, "dev/em": 0.5}]
    assert conclude(rows, config(steps=9), "compact") == (
        "trained 9 steps, reward 0.250 -> 0.750, dev EM 0.250 -> 0.500"
    )
    hopeless = [{**FINE, **ZERO, "rollout/valid_format": 0.0}] * 2
    assert conclude(hopeless, config(steps=2), "compact").startswith(
        "trained 2 steps, but nothing was learned: no trajectory is in the form of protocol compact"
    )
    stopped = conclude(rows + [{**FINE, "rollout/searches": 0.0}] * WINDOW, config(steps=14), "compact")
    assert "reward 0.300 -> 0.300" in stopped and "In the last 5 steps no trajectory searches" in stopped
    assert conclude([], config(steps=3), "compact") == "trained 3 steps"


def test_a_run_that_earns_nothing_warns_once_after_a_few_steps_and_a_short_one_at_its_end(
    toy, tmp_path, caplog, capsys
):
    caplog.set_level(logging.WARNING, "rl.trainer")
    wrong = replace(toy_config(toy, tmp_path / "run"), steps=WINDOW + 2, rewards={"search_r1_legacy": 1.0})
    train(wrong)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(
        "the last 5 steps have nothing to learn from: every reward is 0 (search_r1_legacy)"
    )
    assert len(read_metrics(tmp_path / "run")) == WINDOW + 2


def test_a_policy_that_never_searches_is_told_at_the_end_even_of_one_step(toy, tmp_path, capsys):
    bigram_policy({"</think>": {"<answer>": 1}}).save(tmp_path / "policy", "compact")
    options = {
        "policy": tmp_path / "policy",
        "questions": toy / "train.jsonl",
        "retriever": toy / "index",
        "out": tmp_path / "run",
        "rollout.questions_per_step": 2,
        "rollout.group_size": 2,
        "device": "cpu",
        "steps": 1,
    }
    assert sleuth.main(["train", *[f"--{key}={value}" for key, value in options.items()]]) == 0
    first, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("trained 1 step, but nothing was learned: no trajectory searches. Most likely")
