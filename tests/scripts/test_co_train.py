"""`sleuth co-train`: each stage is a command whose options exist; what a gate refuses does not serve."""

import json
import subprocess
from pathlib import Path

import pytest

from data.atlas.build import build_atlas
from data.errors import ConfigError, SleuthError
from data.jsonl import read_json, write_json, write_jsonl
from scripts import __main__ as sleuth
from scripts import co_train
from scripts.command_line import build_parser, parse

CONFIGS = Path(co_train.__file__).parent / "configs"


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas")
    build_atlas(folder, hard=True)
    return folder


def config(atlas, out, **given):
    return co_train.CoTrainConfig(**{
        "policy": "atlas", "retriever": str(atlas / "index"), "corpus": str(atlas / "corpus.jsonl"),
        "questions": str(atlas / "train.jsonl"), "dev_questions": str(atlas / "dev.jsonl"),
        "train_recipe": str(CONFIGS / "atlas.yaml"),
        "retriever_recipe": str(CONFIGS / "retriever" / "minilm.yaml"),
        "out": str(out), "rollout_questions": 8,
    } | given)  # fmt: skip


class Commands:
    """In the place of `subprocess.run`: checks the options, and leaves what each command would leave."""

    def __init__(self, passes=True, broken=None):
        self.passes, self.broken, self.ran = passes, broken, []

    def __call__(self, argv, check):
        command, options = argv[3], argv[4:]
        if command == self.broken:
            return subprocess.CompletedProcess(argv, 2)
        given = dict(option.removeprefix("--").split("=", 1) for option in options)
        self.ran.append((command, given))
        module = __import__(sleuth.COMMANDS[command].module, fromlist=["main"])
        parse(build_parser(module.main, command), options)
        out = Path(given["out"])
        if command == "evaluate":
            write_json(out / "scores.json", {"em": {"mean": 0.5, "low": 0.4, "high": 0.6}})
        elif command == "gate":
            record = {"passed": self.passes, "reason": "r", "old_found": 0.1, "new_found": 0.2}
            write_json(out, record)
            return subprocess.CompletedProcess(argv, 0 if self.passes else 3)
        elif command == "train":
            checkpoint = out / "checkpoints" / "step-20"
            write_json(checkpoint / "manifest.json", {"format_version": 1, "step": 20})
        elif command == "mine":
            write_jsonl(out, [])
        return subprocess.CompletedProcess(argv, 0)


@pytest.fixture
def commands(monkeypatch):
    def use(**given):
        found = Commands(**given)
        monkeypatch.setattr(co_train.subprocess, "run", found)
        monkeypatch.setattr(
            "data.checkpoint.latest_checkpoint", lambda folder: type("C", (), {"path": folder / "last"})
        )
        return found

    return use


def test_the_loop_trains_on_its_own_searches_and_serves_what_passed(atlas, tmp_path, commands, capsys):
    found = commands()
    co_train.main(config(atlas, tmp_path))
    ran = [command for command, _ in found.ran]
    assert ran == ["evaluate", "evaluate", "mine", "train-retriever", "index", "gate", "train"] * 2
    second = found.ran[7][1]
    assert second["retriever"] == str(tmp_path / "round-0" / "index")
    assert second["policy"] == str(tmp_path / "round-0" / "policy" / "checkpoints" / "last")
    assert json.loads(found.ran[3][1]["train"])[0]["negatives"] == 1
    assert found.ran[2][1]["held_out"] == str(atlas / "dev.jsonl")
    first, later = (read_ids(tmp_path / f"round-{n}" / "questions.jsonl") for n in (0, 1))
    assert len(first) == len(later) == 8 and not first & later
    assert "passed" in capsys.readouterr().out


def test_a_refused_gate_is_recorded_and_the_old_retriever_stays(atlas, tmp_path, commands):
    found = commands(passes=False)
    co_train.main(config(atlas, tmp_path, rounds=3))
    state = read_json(tmp_path / "state.json")["state"]
    assert state["round"] == 2 and state["retriever"] == str(atlas / "index")
    assert [entry["gate"]["passed"] for entry in state["history"]] == [False, False]
    assert found.ran[7][1]["retriever"] == str(atlas / "index")


def test_a_stage_that_fails_is_named_and_taken_up_again(atlas, tmp_path, commands):
    commands(broken="index")
    with pytest.raises(SleuthError, match=r"round 0, index: sleuth index ended with status 2; mend"):
        co_train.main(config(atlas, tmp_path, rounds=1))
    found = commands()
    co_train.main(config(atlas, tmp_path, rounds=1))
    assert [command for command, _ in found.ran] == ["index", "gate", "train"]


def test_too_few_questions_are_said_before_anything_runs(atlas, tmp_path):
    with pytest.raises(ConfigError, match=r"rollout_questions = 4000: 2 rounds need 8,000, .* has 4,500"):
        co_train.main(config(atlas, tmp_path, rollout_questions=4000))


def read_ids(path):
    return {json.loads(line)["id"] for line in path.read_text().splitlines()}
