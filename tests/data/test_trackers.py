"""Trackers behind one interface: what they are told reaches the library; one that is missing is one line."""

import json
import sqlite3
import sys
import types

import pytest

from data.errors import ConfigError
from data.settings import WandbConfig
from data.trackers import Tracker, check_tracker, open_tracker


@pytest.fixture
def told(monkeypatch):
    """Stand-ins for Trackio and TensorBoard that note what is called."""
    told = []

    class Writer:
        def __init__(self, folder):
            told.append(("writer", folder))

        def __getattr__(self, name):
            return lambda *given: told.append((name, *given))

    trackio = types.ModuleType("trackio")
    for name in ("init", "log", "finish"):
        setattr(trackio, name, lambda *given, _name=name, **named: told.append((_name, given, named)))
    trackio.Table = lambda dataframe: dataframe.to_dict("records")
    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    return told


def log_all(tracker):
    tracker.log(3, {"dev/em": 0.5})
    tracker.table(3, "dev/trajectories", ("id", "answer"), [["q1", "a|b\nc"]])
    tracker.close()


def test_trackio_gets_metrics_and_tables_with_their_step(told, tmp_path):
    config = WandbConfig(project="p", tracker="trackio")
    check_tracker(config)
    log_all(open_tracker(tmp_path / "run", {"seed": 1}, config))
    assert told[0][2] == {"project": "p", "name": "run", "config": {"seed": 1}, "resume": "allow"}
    assert told[1] == ("log", ({"dev/em": 0.5},), {"step": 3})
    assert told[2][1] == ({"dev/trajectories": [{"id": "q1", "answer": "a|b\nc"}]},)
    assert told[3][0] == "finish"


def test_tensorboard_gets_scalars_and_tables_as_markdown(told, tmp_path):
    log_all(open_tracker(tmp_path, {"seed": 1}, WandbConfig(project="p", tracker="tensorboard")))
    assert told[0] == ("writer", str(tmp_path / "tensorboard" / "p"))
    assert ("add_scalar", "dev/em", 0.5, 3) in told
    assert ("add_text", "dev/trajectories", "| id | answer |\n| --- | --- |\n| q1 | a\\|b c |\n", 3) in told
    assert told[-1] == ("close",)


def test_without_a_project_nothing_is_tracked_and_a_missing_package_is_named(tmp_path, monkeypatch):
    assert type(open_tracker(tmp_path, {}, WandbConfig())) is Tracker
    log_all(Tracker())
    monkeypatch.setitem(sys.modules, "trackio", None)
    check_tracker(WandbConfig(tracker="trackio"))
    with pytest.raises(ConfigError, match=r"wandb\.tracker = trackio: needs the package trackio"):
        check_tracker(WandbConfig(project="p", tracker="trackio"))


# ---- the packages themselves, where they are installed -----------------------------------------


def trained(folder, tracker):
    """The folder of a run of two steps with an evaluation after each, and what metrics.jsonl says of dev."""
    from scripts.train import train
    from tests.toy import build_toy, toy_config

    tracking = WandbConfig(project="p", tracker=tracker)
    train(toy_config(build_toy(folder), folder / "run", steps=2, eval_every=1, wandb=tracking))
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return folder / "run", [(row["step"], row["dev/em"]) for row in rows if "dev/em" in row]


def test_the_event_files_of_a_training_hold_its_metrics_and_trajectories(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run, dev = trained(tmp_path, "tensorboard")
    events = reader.EventAccumulator(str(run / "tensorboard" / "p"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("dev/em")] == dev and len(dev) == 2
    texts = {name: events.Tensors(f"{name}/text_summary") for name in ("dev/trajectories", "config")}
    shown = texts["dev/trajectories"][1].tensor_proto.string_val[0].decode().splitlines()
    assert shown[0].startswith("| id | question | gold answers | answer |") and len(shown) == 2 + 12
    assert (
        "| dev0 | dev 0? | A |" in shown[2] and b'"steps": 2' in texts["config"][0].tensor_proto.string_val[0]
    )


def test_the_store_of_trackio_holds_the_metrics_and_trajectories_of_a_training(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    pytest.importorskip("trackio")
    _, dev = trained(tmp_path, "trackio")
    with sqlite3.connect(tmp_path / "store" / "p.db") as store:
        rows = store.execute("select run_name, step, metrics from metrics order by id").fetchall()
    logged = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert {name for name, *_ in rows} == {"run"}
    assert [(step, found["dev/em"]) for step, found in logged if "dev/em" in found] == dev and len(dev) == 2
    tables = [found["dev/trajectories"]["_value"] for _, found in logged if "dev/trajectories" in found]
    assert [len(table) for table in tables] == [12, 12] and tables[0][0]["question"] == "dev 0?"
