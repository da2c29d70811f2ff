"""Wrong values are refused with their name and what is allowed; the recipes are right."""

import importlib
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from data.errors import ConfigError
from rl.algorithm.advantages import ADVANTAGES
from rl.algorithm.losses import KL_ESTIMATORS, SURROGATES
from rl.algorithm.presets import PRESETS, preset_fields
from rl.config import AlgorithmConfig, RolloutConfig, TrainConfig, WarmStartConfig
from scripts import __main__ as sleuth
from scripts.command_line import call, known_parser, parse
from scripts.train import expand

ALL_RECIPES = sorted((Path(__file__).parents[2] / "scripts" / "configs").glob("*.yaml"))
OTHER_RECIPES = {"co_train_atlas": "co-train", "one_gpu_24gb_warm": "warm-start"}
RECIPES = [path for path in ALL_RECIPES if path.stem not in OTHER_RECIPES]
KINDS = {"rollout": RolloutConfig, "algorithm": AlgorithmConfig, "training": WarmStartConfig, "": TrainConfig}
MAIN = {"policy": "p", "questions": "q", "retriever": "r", "out": "o"}


@pytest.mark.parametrize(
    ("name", "given", "allowed"),
    [
        ("rollout.questions_per_step", 0, ">= 1"),
        ("rollout.group_size", 0, ">= 1"),
        ("rollout.temperature", 0.0, "> 0"),
        ("rollout.top_p", 0.95, "1, or renormalise_logprobs true"),
        ("rollout.top_k", 50, "0, or renormalise_logprobs true"),
        ("rollout.max_rows", 0, ">= 1"),
        ("rollout.max_failed_share", 1.5, "in [0, 1]"),
        ("rollout.retriever_deadline_seconds", 0.0, "> 0"),
        ("rollout.kind_weights", {"a": -1.0, "b": 2.0}, "numbers >= 0, one of them above"),
        ("rollout.kind_weights", {"a": 0.0}, "numbers >= 0, one of them above"),
        ("rollout.last_kind_weights", {"a": 1.0}, "{} without kind_weights"),
        ("algorithm.learning_rate", 0.0, "> 0"),
        ("algorithm.warmup_steps", -1, ">= 0"),
        ("algorithm.decay_steps", -1, ">= 0"),
        ("algorithm.weight_decay", -0.1, ">= 0"),
        ("algorithm.max_grad_norm", 0.0, "> 0"),
        ("algorithm.updates_per_rollout", 0, ">= 1"),
        ("algorithm.clip_low", 1.0, "in (0, 1)"),
        ("algorithm.clip_high", 0.0, "> 0"),
        ("algorithm.kl_coefficient", -1.0, ">= 0"),
        ("steps", 0, ">= 1"),
        ("eval_every", -1, ">= 0"),
        ("eval_every", 5, "0 without dev_questions"),
        ("eval_limit", 0, ">= 1"),
        ("save_every", 0, ">= 1"),
        ("keep_checkpoints", 0, ">= 1"),
        ("micro_batch_tokens", 0, ">= 1"),
        ("device", "tpu", "auto, cpu or cuda"),
        ("dtype", "float16", "auto, float32 or bfloat16"),
        ("rewards", {}, "at least one reward with its weight"),
        ("training.steps", 0, "> 0"),
        ("training.batch_size", 0, "> 0"),
        ("training.learning_rate", 0.0, "> 0"),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_name(name, given, allowed):
    group, _, field = name.rpartition(".")
    values = {field: given} if group else {**MAIN, field: given}
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{name} = {given!r}: must be {allowed}')}$"):
        KINDS[group](**values)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (
            ["--algorithm.learning_rat", "1"],
            "unknown key algorithm.learning_rat; did you mean algorithm.learning_rate",
        ),
        (["--steps", "many"], "steps: got 'many', expected int"),
        (["--algorithm.clip_low", "2"], "algorithm.clip_low = 2.0: must be in (0, 1)"),
        (["--wandb.mode", "sometimes"], "wandb.mode"),
        (["--algorithm.advantage", "gpro"], "algorithm.advantage: got 'gpro', expected one of 'gae'"),
        (["--algorithm.surrogate", "pop"], "expected one of 'ppo', 'gspo', 'cispo', 'reinforce'"),
        (["--rewards.em", "much"], "rewards"),
    ],
)
def test_sleuth_train_refuses_a_wrong_key_or_value_in_one_line(option, said, capsys, tmp_path):
    arguments = [word for key, value in MAIN.items() for word in (f"--{key}", str(tmp_path / value))]
    assert sleuth.main(["train", *arguments, *option]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sleuth: ") and said in line
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(("name", "command"), OTHER_RECIPES.items())
def test_a_recipe_of_another_command_is_its_configuration(name, command):
    module = importlib.import_module(sleuth.COMMANDS[command].module)
    path = next(path for path in ALL_RECIPES if path.stem == name)
    parse(known_parser(module.main, command), ["--config", str(path)])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_configuration(recipe):
    config = configured("--config", str(recipe))
    assert config.steps > 1 and config.out.startswith("runs/")


def resolved(config: TrainConfig) -> TrainConfig:
    return config


def configured(*argv):
    """The configuration that `sleuth train` makes of its arguments."""
    return call(resolved, expand([*(f"--{key}={value}" for key, value in MAIN.items()), *argv]), "train")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_every_algorithm_field_but_the_recipes(name):
    before = ["--algorithm.learning_rate=0.5", "--algorithm.clip_high=9", "--algorithm.gamma=0.5"]
    config = configured(*before, "--preset", name)
    assert config.preset == name and config.algorithm.learning_rate == 0.5
    expected = AlgorithmConfig(learning_rate=0.5, **preset_fields(name))
    assert config.algorithm == expected


def test_what_follows_a_preset_wins_over_it(tmp_path):
    assert configured("--preset=dapo", "--algorithm.clip_high=0.5").algorithm.clip_high == 0.5
    file = tmp_path / "recipe.yaml"
    file.write_text("preset: dapo\nalgorithm:\n  clip_high: 0.4\n")
    assert configured("--config", str(file)).algorithm.clip_high == 0.4
    assert configured("--config", str(file)).algorithm.dynamic_sampling_rounds == 10
    assert configured(f"--config={file}", "--preset", "cispo").algorithm.clip_high == 4.0


def test_a_preset_that_is_no_name_is_refused_with_its_line(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("preset: [dapo]\n")
    with pytest.raises(ConfigError, match=r"recipe.yaml, line 1: preset: "):
        configured(f"--config={file}")


def test_an_unknown_preset_is_refused_with_those_there_are():
    with pytest.raises(
        ConfigError, match="preset = 'pppo': must be one of search_r1_ppo, search_r1_grpo, ppo"
    ):
        configured("--preset", "pppo")


@pytest.mark.parametrize(
    ("field", "table"),
    [("advantage", ADVANTAGES), ("surrogate", SURROGATES), ("kl_estimator", KL_ESTIMATORS)],
)
def test_the_names_that_a_configuration_takes_are_those_of_the_table(field, table):
    assert get_args(get_type_hints(AlgorithmConfig)[field]) == tuple(table)
