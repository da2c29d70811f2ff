"""`sleuth train` as a command: it trains, goes on, tracks, and refuses before any model loads."""

from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM

from data.run_dir import read_metrics, read_run
from data.settings import WandbConfig
from scripts import __main__ as sleuth
from scripts.train import train
from tests.data.test_run_dir import read_wandb_history
from tests.toy import toy_config

RECIPE = """
policy: {toy}/policy
questions: {toy}/train.jsonl
retriever: {toy}/index
out: {out}
rollout: {{questions_per_step: 2, group_size: 2}}
device: cpu
steps: 2
"""


def command(toy, out, *options):
    (out.parent / "recipe.yaml").write_text(RECIPE.format(toy=toy, out=out))
    return sleuth.main(["train", "--config", str(out.parent / "recipe.yaml"), *map(str, options)])


def test_a_recipe_trains_and_the_same_command_does_nothing_more(toy, tmp_path, capsys):
    assert command(toy, tmp_path / "run") == 0
    assert "sleuth report" in capsys.readouterr().out
    before = (tmp_path / "run" / "checkpoints" / "step-000002" / "model.safetensors").stat().st_mtime_ns
    assert command(toy, tmp_path / "run") == 0
    after = (tmp_path / "run" / "checkpoints" / "step-000002" / "model.safetensors").stat().st_mtime_ns
    assert before == after
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2]


def test_a_dry_run_measures_real_steps_and_keeps_nothing(toy, tmp_path, capsys):
    assert command(toy, tmp_path / "run", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "(as in a trial of 2 of 2 questions)" in printed and "a step, measured" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_dry_run_without_a_retriever_says_what_it_could_not_measure(toy, tmp_path, capsys, caplog):
    assert command(toy, tmp_path / "run", "--retriever", "no/index", "--dry-run") == 0
    assert "(at most, by the limits of protocol compact)" in capsys.readouterr().out
    assert "not measured: retriever 'no/index'" in caplog.text


def test_more_steps_need_to_be_asked_for(toy, tmp_path, capsys):
    assert command(toy, tmp_path / "run") == 0
    assert command(toy, tmp_path / "run", "--steps", 3) == 2
    assert "another configuration (steps: 2 -> 3): --resume true goes on" in capsys.readouterr().err
    assert command(toy, tmp_path / "run", "--steps", 3, "--resume", "true") == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.slow
def test_a_run_goes_on_with_its_questions_alone_however_their_path_is_written(
    toy, tmp_path, capsys, monkeypatch
):
    questions = tmp_path / "train.jsonl"
    questions.write_bytes((toy / "train.jsonl").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert command(toy, tmp_path / "run", "--questions", "train.jsonl") == 0
    assert command(toy, tmp_path / "run", "--questions", questions, "--out", "run") == 0
    capsys.readouterr()
    questions.write_text(questions.read_text().replace("?", "??"))
    assert command(toy, tmp_path / "run", "--questions", "train.jsonl") == 2
    assert "questions: train.jsonl holds something else than then" in capsys.readouterr().err
    assert command(toy, tmp_path / "run", "--questions", "train.jsonl", "--resume", "true") == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--questions", "absent.jsonl"], "absent.jsonl"),
        (["--questions", "{tmp}/malformed.jsonl"], "malformed.jsonl:2: not valid JSON"),
        (["--questions", "{tmp}/empty.jsonl"], "empty.jsonl: no rows"),
        (["--dev_questions", "{tmp}/malformed.jsonl"], "malformed.jsonl:2: not valid JSON"),
        (["--retriever", "no/index"], "retriever 'no/index': must be an http(s) URL or the folder"),
        (["--deterministic", "true", "--retriever", "http://127.0.0.1:1"], "http://127.0.0.1:1 waits for a"),
        (["--policy", "no/such/one"], "policy = 'no/such/one': no folder, no short name"),
        (["--protocol.name", "morse"], "protocol = 'morse': must be one of search_r1, compact, hermes"),
        (["--protocol.top_k", "0"], "protocol.top_k = 0: must be >= 1"),
        (["--rewards", "{{bleu: 1.0}}"], "rewards.bleu: must be one of em, f1"),
        (["--resume", "true"], "nothing to resume"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_left(
    options, said, toy, tmp_path, capsys, monkeypatch
):
    (tmp_path / "malformed.jsonl").write_text('{"question": "a?", "golden_answers": ["A"]}\n{"question"\n')
    (tmp_path / "empty.jsonl").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(
            AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded")
        )
        assert command(toy, tmp_path / "run", *[option.format(tmp=tmp_path) for option in options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sleuth: ")]
    assert said in line
    assert "Traceback" not in line
    assert not (tmp_path / "run").exists()  # it belongs to nobody yet


@pytest.mark.slow
def test_what_was_wrong_can_be_mended(toy, tmp_path, capsys):
    """Also where it is found last, in a retriever that is open."""
    inside = "{class_path: Cached, init_args: {retriever: 'http://127.0.0.1:1'}}"
    (tmp_path / "remote.yaml").write_text(f"class_path: Fuse\ninit_args: {{parts: [none, {inside}]}}\n")
    wrong = ("--deterministic", "true", "--retriever", tmp_path / "remote.yaml")
    assert command(toy, tmp_path / "run", *wrong) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sleuth: ")]
    assert "remote.yaml waits for a server" in line
    assert command(toy, tmp_path / "run") == 0


@pytest.mark.slow
def test_a_run_from_the_seed_policy_notes_what_is_wired_in(toy, tmp_path):
    assert command(toy, tmp_path / "run", "--policy", "atlas", "--steps", 1) == 0
    assert "Copying is wired" in read_run(tmp_path / "run")["notes"][0]


def test_wandb_offline_holds_the_metrics_of_a_run_and_of_its_resumption(toy, tmp_path):
    config = toy_config(toy, tmp_path / "run", wandb=WandbConfig("sleuth-test", "offline"))
    train(config)
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    rows = read_wandb_history(file)
    logged = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    assert [row["reward/mean"] for row in rows] == [row["reward/mean"] for row in logged]
    assert read_run(tmp_path / "run")["status"] == "finished"
    (tmp_path / "run" / "wandb").rename(tmp_path / "first")  # wandb names folders by the second
    train(replace(config, steps=3, resume=True))
    (again,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    assert [row["step"] for row in read_wandb_history(again)] == [3]
