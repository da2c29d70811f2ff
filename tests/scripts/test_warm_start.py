"""`sleuth warm-start`: a policy out of demonstrations, and what it refuses before it starts."""

import pytest

from agent.policy import load_policy
from agent.policy_folder import own_protocol
from data.jsonl import read_json, write_jsonl
from rl import warm_start as floor_below
from scripts import __main__ as sleuth

RECORD = {
    "id": "d",
    "question": "Where is Lyon",
    "steps": [
        {"think": "find", "search": "Lyon", "passages": [{"id": "0", "title": "Lyon", "text": "In France."}]},
        {"think": "read", "answer": "France"},
    ],
}


def run(out, *options):
    training = ["--training.steps", "2", "--training.batch_size", "2"]
    return sleuth.main(["warm-start", "--out", str(out), *training, *map(str, options)])


@pytest.fixture
def demonstrations(tmp_path):
    write_jsonl(tmp_path / "demonstrations.jsonl", [RECORD] * 4)
    return tmp_path / "demonstrations.jsonl"


def test_a_policy_comes_out_which_the_next_one_starts_from(demonstrations, tmp_path, capsys):
    assert run(tmp_path / "one", "--demonstrations", demonstrations) == 0
    assert "learnt from 4 demonstrations" in capsys.readouterr().out
    assert own_protocol(str(tmp_path / "one")).name == "compact"
    left = {path.name for path in (tmp_path / "one").iterdir()}
    assert left == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "sleuth.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "warm_start.json",
    }
    told = read_json(tmp_path / "one" / "warm_start.json")
    assert told["queries"] == {"as given": 4} and told["training"]["steps"] == 2
    assert run(tmp_path / "two", "--demonstrations", demonstrations, "--policy", tmp_path / "one") == 0
    assert len(load_policy(str(tmp_path / "two")).tokenizer) == len(
        load_policy(str(tmp_path / "one")).tokenizer
    )


def test_invented_worlds_need_no_file(tmp_path, capsys):
    assert run(tmp_path / "out", "--invented", 6, "--protocol", "search_r1") == 0
    assert "learnt from 6 demonstrations" in capsys.readouterr().out
    assert own_protocol(str(tmp_path / "out")).name == "search_r1"


@pytest.mark.slow
def test_one_that_is_interrupted_can_be_started_again(demonstrations, tmp_path, monkeypatch):
    from transformers import Trainer

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupted)
        assert run(tmp_path / "out", "--demonstrations", demonstrations) == 130
    assert run(tmp_path / "out", "--demonstrations", demonstrations) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give either demonstrations (a file) or invented (a number)"),
        (["--demonstrations", "d.jsonl", "--invented", "3"], "not both or none"),
        (["--invented", "-1"], "invented = -1: must be >= 0"),
        (["--demonstrations", "absent.jsonl"], "absent.jsonl: no such file"),
        (["--invented", "3", "--protocol", "morse"], "protocol = 'morse': must be one of search_r1"),
        (["--invented", "3", "--policy", "no/such/one"], "policy = 'no/such/one': no folder, no short name"),
        (["--invented", "3", "--training.batch_size", "0"], "training.batch_size = 0: must be > 0"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_anything_is_taught(
    options, said, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(floor_below, "warm_start", lambda *_: pytest.fail("taught"))
    assert run(tmp_path / "out", *options) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("sleuth: ") and said in line
    assert not (tmp_path / "out").exists()


def test_another_warm_start_does_not_go_on_where_one_was_stopped(demonstrations, tmp_path, capsys):
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    (tmp_path / "out" / "warm_start.json").write_text('{"training": {"steps": 7}}')
    assert run(tmp_path / "out", "--demonstrations", demonstrations) == 2
    assert "holds the beginning of another warm start" in capsys.readouterr().err


def test_a_policy_is_never_written_over_another(demonstrations, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    assert run(tmp_path / "out", "--demonstrations", demonstrations) == 2
    assert "is not empty; a policy is never written over another" in capsys.readouterr().err
