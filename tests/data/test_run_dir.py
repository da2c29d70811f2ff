"""A run folder: its metrics survive a kill and a resume, one process writes it, others are refused."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from data.errors import ConfigError, DataError, RunStopped
from data.run_dir import RunDir, describe_difference, read_config, read_metrics, read_run
from data.trackers import WandbTracker

CONFIG = {"algorithm": {"learning_rate": 1e-6, "clip": (0.2, 0.28)}, "steps": 3}
ROOT = Path(__file__).parents[2]


def status(path):
    return read_run(path)["status"]


def test_a_run_records_its_configuration_its_metrics_and_how_it_ended(tmp_path):
    lines = []
    with RunDir(
        tmp_path / "run", CONFIG, notes=["copying is wired in"], on_log=lambda *logged: lines.append(logged)
    ) as run:
        assert status(run.path) == "running"
        run.log(0, {"reward/mean": 0.25, "policy/kl": float("nan")})
        run.log(1, {"reward/mean": 0.5})
    info = read_run(run.path)
    assert info["status"] == "finished" and info["notes"] == ["copying is wired in"]
    assert info["format_version"] == 1 and info["created"]
    assert yaml.safe_load((run.path / "config.yaml").read_text())["algorithm"]["clip"] == [0.2, 0.28]
    assert read_metrics(run.path) == [
        {"step": 0, "reward/mean": 0.25, "policy/kl": None},
        {"step": 1, "reward/mean": 0.5},
    ]
    assert lines[1] == (1, {"reward/mean": 0.5})


@pytest.mark.parametrize(
    ("error", "status_then", "reason"),
    [
        (KeyboardInterrupt(), "interrupted", "interrupted by the user"),
        (asyncio.CancelledError(), "interrupted", "interrupted by the user"),  # Ctrl-C in asyncio.run
        (RunStopped("retriever is gone"), "stopped", "retriever is gone"),
        (ValueError("a bug"), "stopped", "ValueError: a bug"),
    ],
)
def test_how_a_run_ended_is_written_down(tmp_path, error, status_then, reason):
    with pytest.raises(type(error)), RunDir(tmp_path, CONFIG):
        raise error
    assert (status(tmp_path), read_run(tmp_path)["reason"]) == (status_then, reason)


def test_resuming_drops_the_metrics_from_the_resumed_step_on(tmp_path):
    with RunDir(tmp_path, CONFIG, notes=["n"]) as run:
        for step in range(5):
            run.log(step, {"a/x": step})
    created = read_run(tmp_path)["created"]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "a/')  # killed in mid-line
    with RunDir(tmp_path, CONFIG, resume=True) as run:
        run.rewind(3)
        run.log(3, {"a/x": 30})
    assert [(row["step"], row["a/x"]) for row in read_metrics(tmp_path)] == [(0, 0), (1, 1), (2, 2), (3, 30)]
    assert read_run(tmp_path)["created"] == created and read_run(tmp_path)["notes"] == ["n"]


def test_a_cut_last_line_does_not_spoil_the_next_one(tmp_path):
    RunDir(tmp_path, CONFIG).close()
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "a/x": 1}\n{"step": 1, "a')
    with RunDir(tmp_path, CONFIG) as run:
        run.log(1, {"a/x": 2})
    assert [row["a/x"] for row in read_metrics(tmp_path)] == [1, 2]


def test_a_setting_that_is_new_and_none_is_no_other_configuration(tmp_path):
    with RunDir(tmp_path, CONFIG) as run:
        run.log(1, {"a/x": 1})
    RunDir(tmp_path, CONFIG | {"normalizer": None}).close()


def test_another_configuration_is_refused_by_key_unless_resumed(tmp_path):
    with RunDir(tmp_path, CONFIG) as run:
        run.log(1, {"a/x": 1})
    changed = {"algorithm": {"learning_rate": 3e-6, "clip": (0.2, 0.28)}, "steps": 3, "seed": 1}
    with pytest.raises(ConfigError, match=r"algorithm\.learning_rate: 1e-06 -> 3e-06; seed: 'absent' -> 1"):
        RunDir(tmp_path, changed)
    RunDir(tmp_path, CONFIG).close()  # the same is no difference, tuples or not
    RunDir(tmp_path, changed, resume=True).close()
    assert read_config(tmp_path)["seed"] == 1


def test_a_start_that_failed_before_its_first_step_binds_nobody(tmp_path):
    with pytest.raises(ConfigError), RunDir(tmp_path, {"policy": "mispelt"}):
        raise ConfigError("no such policy")
    RunDir(tmp_path, {"policy": "right"}).close()
    assert read_config(tmp_path) == {"policy": "right"}


def test_a_refused_change_says_how_to_resume(tmp_path):
    with RunDir(tmp_path, CONFIG) as run:
        run.log(1, {"a/x": 1})
    with pytest.raises(ConfigError, match=r"steps: 3 -> 9\): --resume true goes on with these changes"):
        RunDir(tmp_path, {**CONFIG, "steps": 9})


@pytest.mark.parametrize(
    "written", ["q.jsonl", "./q.jsonl", "{folder}/q.jsonl", "link/q.jsonl", "sub/../q.jsonl"]
)
def test_a_path_written_otherwise_is_the_same_configuration(tmp_path, monkeypatch, written):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text("{}")
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    config = {"questions": "q.jsonl,q.jsonl", "train": [{"examples": "q.jsonl"}], "out": "run"}
    with RunDir("run", config) as run:
        run.log(1, {"a/x": 1})
    path = written.format(folder=tmp_path)
    same = {"questions": f"{path},q.jsonl", "train": [{"examples": path}], "out": str(tmp_path / "run")}
    RunDir("run", same).close()
    monkeypatch.chdir(tmp_path / "sub")  # a relative path of the run begins where the run began
    RunDir(
        "../run", {**same, "questions": "../q.jsonl,../q.jsonl", "train": [{"examples": "../q.jsonl"}]}
    ).close()
    (tmp_path / "other.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"train\.0\.examples"):
        RunDir("../run", {**same, "train": [{"examples": "../other.jsonl"}]})


def test_two_words_that_name_no_file_are_never_one_path(tmp_path):
    with RunDir(tmp_path, {"template": "a/../b"}) as run:
        run.log(1, {"a/x": 1})
    with pytest.raises(ConfigError, match="template"):
        RunDir(tmp_path, {"template": "b"})


def test_other_data_at_the_same_path_is_refused_by_name_unless_resumed(tmp_path):
    with RunDir(tmp_path, CONFIG, inputs={"questions": ("q.jsonl", "aa")}) as run:
        run.log(1, {"a/x": 1})
    RunDir(tmp_path, CONFIG, inputs={"questions": ("./q.jsonl", "aa")}).close()
    with pytest.raises(ConfigError, match=r"questions: q\.jsonl holds something else than then"):
        RunDir(tmp_path, CONFIG, inputs={"questions": ("q.jsonl", "bb")})
    RunDir(tmp_path, CONFIG, resume=True, inputs={"questions": ("q.jsonl", "bb")}).close()
    RunDir(tmp_path, CONFIG, inputs={"questions": ("q.jsonl", "bb")}).close()


def test_a_run_of_the_first_version_has_no_hashes_and_resumes(tmp_path):
    with RunDir(tmp_path, CONFIG) as run:
        run.log(1, {"a/x": 1})
    info = {key: value for key, value in read_run(tmp_path).items() if key not in ("inputs", "folder")}
    (tmp_path / "run.json").write_text(json.dumps(info))
    RunDir(tmp_path, CONFIG, inputs={"questions": ("q.jsonl", "aa")}).close()
    assert read_run(tmp_path)["inputs"] == {"questions": "aa"}


def test_an_empty_setting_that_is_gone_is_no_difference(tmp_path):
    assert describe_difference({"steps": 1, "changes": {}, "note": None}, {"steps": 1}) == []
    assert describe_difference({"changes": {"model": 1}}, {}) == ["changes: {'model': 1} -> 'absent'"]


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(
        ConfigError, match=r"holds other files \(thesis\.tex\); give an empty or a new folder"
    ):
        RunDir(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError, match="is a file, must be a folder"):
        RunDir(tmp_path / "thesis.tex", CONFIG)
    (tmp_path / "thesis.tex").rename(tmp_path / ".gitkeep")
    RunDir(tmp_path, CONFIG).close()  # hidden files are nobody's results


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(ConfigError, match="nothing to resume"):
        RunDir(tmp_path / "absent", CONFIG, resume=True)
    assert not (tmp_path / "absent").exists()


def test_two_processes_never_write_the_same_run(tmp_path):
    with RunDir(tmp_path, CONFIG):
        with pytest.raises(ConfigError, match=rf"is being written by process {os.getpid()}"):
            RunDir(tmp_path, CONFIG)
        assert status(tmp_path) == "running"
    RunDir(tmp_path, CONFIG).close()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    code = (
        "import os, sys; from data.run_dir import RunDir; "
        "run = RunDir(sys.argv[1], {}); run.log(0, {'a/x': 1.0}); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    assert killed.returncode == -9 and status(tmp_path) == "running"
    assert (tmp_path / "run.pid").read_text().strip().isdigit()
    with RunDir(tmp_path, {}) as run:
        run.log(1, {"a/x": 2.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]


def test_a_folder_that_is_no_run_or_of_a_newer_format_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"is no run folder: it holds no run\.json"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(DataError, match="format_version 99 is newer"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(DataError, match="no format_version"):
        read_run(tmp_path)


def read_wandb_history(path):
    """The history rows of a finished .wandb file: the process that writes it may end after us."""
    deadline = time.monotonic() + 30
    while True:
        records = list(read_wandb_records(path.read_bytes()))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            break
        assert time.monotonic() < deadline, f"{path} was never finished"
        time.sleep(0.02)
    histories = [r.history.item for r in records if r.WhichOneof("record_type") == "history"]
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
        for items in histories
    ]


def read_wandb_records(raw):
    """The records of a .wandb file: 7 bytes, then the log format of LevelDB in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    at, part = 7, b""
    while at + 7 <= len(raw):
        if 32_768 - at % 32_768 < 7:  # a block ends in padding where no header fits
            at += 32_768 - at % 32_768
            continue
        size, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        if at + 7 + size > len(raw):
            return  # still being written
        part, at = part + raw[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield wandb_internal_pb2.Record.FromString(part)
            part = b""


@pytest.mark.slow
def test_wandb_that_cannot_be_reached_or_logged_in_to_is_one_line(tmp_path, monkeypatch):
    for name in ("HOME", "XDG_CONFIG_HOME", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    code = "import sys; from data.trackers import check_wandb; check_wandb(sys.argv[1])"

    def check(mode, url):
        monkeypatch.setenv("WANDB_BASE_URL", url)
        command = [sys.executable, "-c", code, mode]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stderr.splitlines()

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert "not logged in to" in check("online", f"http://127.0.0.1:{port}")[-1]
    last = check("online", f"http://127.0.0.1:{port}")[-1]
    assert "cannot be reached (Connection refused); --wandb.mode offline keeps the run on this disk" in last
    assert check("offline", f"http://127.0.0.1:{port}") == []


def test_wandb_that_refuses_a_run_is_one_line(tmp_path, monkeypatch):
    import wandb
    from wandb.errors import UsageError

    def refuse(**_):
        raise UsageError("No API key configured.\nmore")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match=r"^wandb: No API key configured\.; --wandb\.mode offline"):
        WandbTracker(tmp_path, {}, "sleuth", "online")


@pytest.mark.slow
def test_wandb_offline_holds_what_was_logged(tmp_path):
    with RunDir(tmp_path, CONFIG) as run:
        run.tracker = WandbTracker(tmp_path, CONFIG, "sleuth", "offline")
        run.log(0, {"reward/mean": 0.25})
        run.log(1, {"reward/mean": 0.75})
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = read_wandb_history(file)
    assert [(row["step"], row["reward/mean"]) for row in rows] == [(0, 0.25), (1, 0.75)]
