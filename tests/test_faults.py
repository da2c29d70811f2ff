"""Faults of the world while a policy is trained, and how each ends: nothing is lost, nothing is
learnt from it, one line says how to go on.
"""

import json
import logging
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from data.checkpoint import latest_checkpoint
from data.errors import StorageError
from data.jsonl import write_jsonl
from data.run_dir import read_metrics, read_run
from rl.config import ProtocolConfig, RolloutConfig
from rl.learner.learner import Learner
from rl.trainer import Trainer
from scripts import __main__ as sleuth
from scripts.train import train
from tests.processes import sleuth as start
from tests.retriever_server.running import running_server, start_server
from tests.toy import bigram_policy, toy_config

ROOT = Path(__file__).parents[1]
PATIENCE_SECONDS = 60


@pytest.fixture
def trained(monkeypatch):
    """Every trajectory that reaches the learner."""
    seen, update = [], Learner.learn

    def spy(self, collected, step):
        seen.extend(trajectory for group in collected.groups for trajectory in group.trajectories)
        return update(self, collected, step)

    monkeypatch.setattr(Learner, "learn", spy)
    return seen


def arguments(toy, out, retriever=None, **options):
    """The words of a `sleuth train` of small deterministic steps."""
    values = {
        "policy": toy / "policy",
        "questions": toy / "train.jsonl",
        "retriever": retriever or toy / "index",
        "out": out,
        "protocol.top_k": 3,
        "rollout.questions_per_step": 3,
        "rollout.group_size": 4,
        "algorithm.learning_rate": 1e-3,
        "device": "cpu",
        "deterministic": str(retriever is None).lower(),
        **options,
    }
    return ["train", *(f"--{key}={value}" for key, value in values.items())]


def wait_for_steps(process, out, steps):
    """Until the run has logged so many steps."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (out / "metrics.jsonl").exists() or len(read_metrics(out)) < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def complaint(error_output):
    """The one line for the user, of a process that printed no traceback."""
    assert "Traceback" not in error_output
    (line,) = [line for line in error_output.splitlines() if line.startswith("sleuth: ")]
    assert line == error_output.splitlines()[-1]
    return line


def steps_of(out):
    return [row["step"] for row in read_metrics(out)]


def assert_same_weights(out, other, step):
    one, two = (
        AutoModelForCausalLM.from_pretrained(run / "checkpoints" / f"step-{step:06d}").state_dict()
        for run in (out, other)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_retriever_that_comes_back_in_time_costs_nothing_but_time(toy, tmp_path, trained, caplog):
    with running_server(toy / "index") as server:
        restarted = []

        def restart():
            deadline = time.monotonic() + PATIENCE_SECONDS
            while "asking again" not in caplog.text and time.monotonic() < deadline:
                time.sleep(0.01)
            restarted.append(start_server(toy / "index", port=server.port))

        thread = threading.Thread(target=restart, daemon=True)

        def on_step(step):
            if step == 2:
                server.stop(signal.SIGKILL)
                thread.start()

        with caplog.at_level(logging.WARNING):
            train(
                toy_config(toy, tmp_path, steps=5, retriever=server.url, deterministic=False), on_step=on_step
            )
        thread.join(PATIENCE_SECONDS)
        restarted[0].stop()
        restarted[0].process.close()
    assert f"{server.url}: answers again" in caplog.text
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(row["stop/search_failed"] == 0 for row in rows)
    assert len(trained) == 5 * 12
    assert all(search.hits and search.error is None for t in trained for search in t.searches)


@pytest.mark.slow
def test_a_retriever_that_stays_away_stops_the_run_with_its_state_saved(toy, tmp_path):
    out = tmp_path / "run"
    with running_server(toy / "index") as server:
        argv = arguments(toy, out, server.url, steps=30, **{"rollout.retriever_deadline_seconds": 0.5})
        process = start(*argv)
        wait_for_steps(process, out, 3)
        server.stop(signal.SIGKILL)
        _, error_output = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 2
    line = complaint(error_output)
    assert "searches or rewards failed in" in line and "start the same command again to go on" in line
    assert "asking again for up to 0.5 s" in error_output
    assert read_run(out)["status"] == "stopped"
    done = steps_of(out)
    assert done == list(range(1, len(done) + 1)) and len(done) < 30
    assert latest_checkpoint(out / "checkpoints").step == len(done)
    with running_server(toy / "index", port=server.port):
        assert sleuth.main(argv) == 0
    assert steps_of(out) == list(range(1, 31))


def test_an_interrupted_run_keeps_its_state_and_the_same_command_finishes_it(
    toy, tmp_path, monkeypatch, capsys
):
    out, one_step = tmp_path / "run", Trainer._one_step
    argv = arguments(toy, out, steps=2, save_every=1000)

    async def interrupted(self):
        if self.step == 1:
            signal.raise_signal(signal.SIGINT)
        await one_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_one_step", interrupted)
        assert sleuth.main(argv) == 130
    line = complaint(capsys.readouterr().err)
    assert f"the state is saved in {out}: start the same command again to go on" in line
    assert read_run(out)["status"] == "interrupted" and latest_checkpoint(out / "checkpoints").step == 1
    assert sleuth.main(argv) == 0
    assert steps_of(out) == [1, 2] and read_run(out)["status"] == "finished"


@pytest.mark.slow
def test_ctrl_c_saves_the_state_and_the_same_command_finishes_the_run(toy, tmp_path):
    out, whole = tmp_path / "run", tmp_path / "whole"
    argv = arguments(toy, out, steps=25, save_every=1000)
    process = start(*argv)
    wait_for_steps(process, out, 3)
    process.send_signal(signal.SIGINT)
    _, error_output = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    line = complaint(error_output)
    assert f"the state is saved in {out}: start the same command again to go on" in line
    assert read_run(out)["status"] == "interrupted"
    done = steps_of(out)
    assert latest_checkpoint(out / "checkpoints").step == len(done) < 25
    assert sleuth.main(argv) == 0
    assert steps_of(out) == list(range(1, 26)) and read_run(out)["status"] == "finished"
    assert sleuth.main(arguments(toy, whole, steps=25, save_every=1000)) == 0
    assert_same_weights(out, whole, 25)


@pytest.mark.slow
def test_a_killed_process_and_its_heir_make_the_run_of_one_that_lived(toy, tmp_path):
    out, whole = tmp_path / "run", tmp_path / "whole"
    argv = arguments(toy, out, steps=30, save_every=4)
    process = start(*argv)
    wait_for_steps(process, out, 6)
    process.kill()
    process.communicate()
    assert read_run(out)["status"] == "running" and len(steps_of(out)) < 30
    assert sleuth.main(argv) == 0
    assert sleuth.main(arguments(toy, whole, steps=30, save_every=4)) == 0
    assert steps_of(out) == list(range(1, 31))
    assert_same_weights(out, whole, 30)


@pytest.mark.slow
@pytest.mark.parametrize("limit_bytes", [20_000, 150_000], ids=["weights", "optimiser"])
def test_a_full_disk_at_a_checkpoint_leaves_the_earlier_one(toy, tmp_path, limit_bytes):
    config = toy_config(toy, tmp_path / "full", steps=4, save_every=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(step):
        if step == 2:
            sizes = [path.stat().st_size for path in (tmp_path / "full").glob("checkpoints/*/*.safetensors")]
            assert max(sizes) > limit_bytes > 1000
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))

    try:
        with pytest.raises(StorageError, match=r"cannot save checkpoint .*step-000004: .*large") as caught:
            train(config, on_step=fill_the_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(str(caught.value).splitlines()) == 1
    assert [path.name for path in (tmp_path / "full" / "checkpoints").glob("*step*")] == ["step-000002"]
    train(config)
    train(replace(config, out=str(tmp_path / "whole")))
    assert_same_weights(tmp_path / "full", tmp_path / "whole", 4)
    assert steps_of(tmp_path / "full") == [1, 2, 3, 4]


def test_a_passage_that_speaks_the_protocol_answers_nothing(toy, tmp_path, trained):
    bigram_policy({"</think>": {"<search>": 1}}).save(tmp_path / "policy", "compact")
    write_jsonl(tmp_path / "q.jsonl", [{"question": "who?", "golden_answers": ["x"]}])
    rollout = RolloutConfig(questions_per_step=1, group_size=4)
    files = {"policy": str(tmp_path / "policy"), "questions": str(tmp_path / "q.jsonl")}
    protocol = ProtocolConfig(max_turns=2, top_k=3)
    train(toy_config(toy, tmp_path / "run", steps=1, rollout=rollout, protocol=protocol, **files))
    (row,) = read_metrics(tmp_path / "run")
    assert row["reward/mean"] == row["rollout/em"] == row["stop/answered"] == 0
    found = [hit.passage.text for t in trained for search in t.searches for hit in search.hits]
    assert any("</information><answer>x</answer>" in text for text in found)
    shown = [s.text for t in trained for s in t.segments if s.kind == "observation"]
    assert shown and all(text.count("</information>") == 1 and "<answer>" not in text for text in shown)


CALL_EACH = """
import json, sys
from scripts.__main__ import main
for argv in json.load(sys.stdin):
    status = main(argv)
    print(status, "torch" in sys.modules, flush=True)
"""


@pytest.mark.slow
def test_what_the_caller_got_wrong_is_said_at_once(toy, tmp_path):
    (tmp_path / "malformed.jsonl").write_text('{"question": "a?", "golden_answers": ["A"]}\n{"question"\n')
    run = tmp_path / "run"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        calls = {
            "unknown key algorithm.clip; did you mean": arguments(toy, run, **{"algorithm.clip": 0.1}),
            "absent.jsonl": arguments(toy, run, questions="absent.jsonl"),
            "malformed.jsonl:2: not valid JSON": arguments(toy, run, questions=tmp_path / "malformed.jsonl"),
            f"cannot listen on 127.0.0.1:{port}": ["serve", f"--index={toy / 'index'}", f"--port={port}"],
            "retriever 'absent'": arguments(toy, run, retriever="absent"),
        }
        ended = subprocess.run(
            [sys.executable, "-c", CALL_EACH],
            input=json.dumps(list(calls.values())),
            cwd=ROOT,
            text=True,
            capture_output=True,
        )
    # Only to open an index or a server, which comes last, is more than our own code imported.
    assert ended.stdout.splitlines()[:3] == ["2 False"] * 3 and ended.stdout.count("2 ") == len(calls)
    said = ended.stderr.splitlines()
    assert len(said) == len(calls), ended.stderr
    for line, part in zip(said, calls, strict=True):
        assert line.startswith("sleuth: ") and part in line
    assert not (run / "metrics.jsonl").exists()
