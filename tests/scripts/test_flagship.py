"""`sleuth flagship`: its comparison against a table worked out by hand; what it passes over or refuses."""

import json
import signal
from types import SimpleNamespace

import pytest

from data.jsonl import write_jsonl
from scripts import __main__ as sleuth
from scripts import flagship, phases
from scripts.flagship import Flagship, as_markdown, compare, finds_answer


def record(id_, said, em):
    searches = [{"query": "Italy", "hits": [{"text": said}]}] if said else []
    return {
        "id": id_,
        "question": "What is the capital of Italy?",
        "answer": said,
        "stop_reason": "answer",
        "invalid_actions": 0,
        "segments": [],
        "cover_em": em,
        "gold_answers": ["Rome"],
        "metadata": {},
        "searches": searches,
        "em": em,
        "f1": em,
        "valid_format": True,
    }


def evaluation(folder, rows):
    folder.mkdir(parents=True)
    write_jsonl(folder / "trajectories.jsonl", rows)
    (folder / "scores.json").write_text("{}")


def test_a_passage_that_says_the_answer_is_found_and_one_that_holds_its_letters_is_not():
    assert finds_answer(record("a", "It is Rome.", 0.0))
    assert not finds_answer(record("a", "Of Romeo.", 0.0))
    assert not finds_answer(record("a", "", 1.0))


def test_the_comparison_is_that_of_the_same_questions(tmp_path):
    found, missed = "It is Rome.", "Paris."
    evaluation(
        tmp_path / "before", [record(str(i), found if i < 2 else missed, float(i < 1)) for i in range(8)]
    )
    evaluation(
        tmp_path / "after", [record(str(i), found if i < 6 else missed, float(i < 3)) for i in range(8)]
    )
    results = compare(tmp_path)
    assert results["questions"] == 8 and results["scores"].keys() == {"before", "after"}
    assert [results["scores"][n]["found"]["mean"] for n in ("before", "after")] == [0.25, 0.75]
    assert results["em where found"] == {"before": 0.5, "after": 0.5}
    difference = results["differences"]["after less before"]
    assert difference["found"]["mean"] == 0.5 and difference["em"]["mean"] == 0.25
    assert difference["found"]["low"] > 0 > difference["valid format"]["low"] - 1
    text = as_markdown(results)
    assert "| before: after the warm start | 0.250 [" in text and "| after less before | 0.500 [" in text


def test_the_control_takes_the_time_of_what_it_stands_beside(tmp_path):
    run = Flagship(tmp_path, tmp_path, "smollm2", 0)
    run.phases.seconds = {"warm cpu": 50.0, "grpo cpu": 75.0}
    assert run.control_steps(100) == 150


def test_a_stage_that_is_done_is_passed_over_and_one_that_fails_ends_the_run(tmp_path, monkeypatch):
    run, ran = Flagship(tmp_path, tmp_path, "smollm2", 0), []
    monkeypatch.setattr(run, "_run", ran.append)
    run._stage("index", None, corpus="c", on=True)
    (tmp_path / "there").touch()
    run._stage("index", tmp_path / "there", corpus="c")
    assert ran == [["index", "--corpus", "c", "--on", "true"]] and run.phases.seconds.keys() == {
        "index",
        "index cpu",
    }
    with pytest.raises(flagship.SleuthError, match="`sleuth search` ended with status 2"):
        Flagship(tmp_path, tmp_path, "smollm2", 0)._run(["search"])


def test_a_stage_that_is_interrupted_leaves_it_to_the_whole_to_say_so(monkeypatch, capfd):
    assert (
        phases.run_stage(["atlas", "--invented", "x"]) == 2 and "sleuth: invented" in capfd.readouterr().err
    )
    before = "import signal, scripts.__main__ as m; m.dispatch = lambda argv: signal.raise_signal(2); "
    monkeypatch.setattr(phases, "_STAGE", before + phases._STAGE)
    with pytest.raises(KeyboardInterrupt):
        phases.run_stage(["atlas"])
    assert capfd.readouterr().err == ""


def test_a_stage_in_a_terminal_ends_where_the_whole_alone_is_told_to(monkeypatch, tmp_path):
    """Ctrl-C tells both, SIGTERM to one process not the other."""
    told = "import os, signal, sys, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(5)"
    monkeypatch.setattr(phases, "_STAGE", f"{told}; open(sys.argv[1], 'w')")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        ours = signal.getsignal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            phases.run_stage([str(tmp_path / "done")])
        assert not (tmp_path / "done").exists() and signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_run_goes_on_as_it_was_begun_or_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(flagship, "cpu_has_bfloat16", lambda: False)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(flagship.ConfigError, match=r"holds other files .thesis.tex."):
        flagship.begun_as(tmp_path / "flagship.json", {"dtype": "auto"})
    file, wanted = (
        tmp_path / "new" / "flagship.json",
        {"data": str(tmp_path), "steps": None, "dtype": "bfloat16"},
    )
    assert flagship.begun_as(file, wanted)["dtype"] == "bfloat16"
    assert flagship.begun_as(file, wanted | {"dtype": "auto"})["dtype"] == "bfloat16"  # not what is native
    monkeypatch.chdir(tmp_path)
    assert flagship.begun_as(file, wanted | {"data": "."})
    for other in ({"dtype": "float32"}, {"steps": 3}, {"data": ".."}):
        with pytest.raises(flagship.ConfigError, match=f"was begun otherwise .{next(iter(other))}: "):
            flagship.begun_as(file, wanted | other)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "none"], "data = none: holds no corpus.jsonl, train.jsonl, dev.jsonl"),
        (["--data", "none", "--warm_steps", "0"], "warm_steps = 0: must be >= 1"),
        (["--data", ".", "--policy", "no/such/one"], "policy = 'no/such/one': no folder"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(options, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("corpus", "train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({}))
    assert sleuth.main(["flagship", "--out", "out", *options]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
