"""Trackers behind one interface: what they are told reaches the library; one that is missing is one line."""

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
    assert ("add_text", "dev/trajectories", "| id | answer |\n| --- | --- |\n| q1 | a\\|b c |", 3) in told
    assert told[-1] == ("close",)


def test_without_a_project_nothing_is_tracked_and_a_missing_package_is_named(tmp_path, monkeypatch):
    assert type(open_tracker(tmp_path, {}, WandbConfig())) is Tracker
    log_all(Tracker())
    monkeypatch.setitem(sys.modules, "trackio", None)
    check_tracker(WandbConfig(tracker="trackio"))
    with pytest.raises(ConfigError, match=r"wandb\.tracker = trackio: needs the package trackio"):
        check_tracker(WandbConfig(project="p", tracker="trackio"))
