"""`sleuth quickstart` end to end on a tiny policy; a second start makes nothing again."""

import pytest

from agent.engines.hf import HFEngine
from data.atlas.build import build_atlas
from data.jsonl import read_json
from data.run_dir import read_metrics, read_run
from scripts import __main__ as sleuth
from scripts import quickstart
from tests import processes
from tests.terminal import Terminal
from tests.toy import bigram_policy

RECIPE = """
policy: {folder}/policy
questions: replaced
retriever: replaced
out: replaced
rollout: {{questions_per_step: 2, group_size: 4}}
steps: 3
eval_every: 2
eval_limit: 6
device: cpu
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    bigram_policy().save(folder / "policy", "compact")
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    return folder / "recipe.yaml"


class ForkedServer:
    """Stands in for a ManagedProcess of `python -m scripts`, without the seconds of its start."""

    def __init__(self, command, log, grace_seconds):
        self._process = processes.sleuth(*command[3:], log=log)

    @property
    def status(self):
        return self._process.poll()

    def stop(self, seconds):
        self._process.terminate()
        self._process.wait(seconds)
        self._process.close()


@pytest.fixture
def start(recipe, tmp_path, monkeypatch):
    """Runs the command on the first hundred questions of each file; returns its exit status."""

    def build_little(folder):
        build_atlas(folder)
        for name in ("train", "dev", "test"):
            lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            (folder / f"{name}.jsonl").write_text("".join(lines[:100]), encoding="utf-8")

    monkeypatch.setattr("data.atlas.build.build_atlas", build_little)
    monkeypatch.setattr(quickstart, "ManagedProcess", ForkedServer)
    monkeypatch.setattr(quickstart, "RECIPE", recipe)
    return lambda *options: sleuth.main(["quickstart", f"--out={tmp_path / 'run'}", "--limit=12", *options])


def stamps(run):
    """Return the time at which each expensive file was written."""
    files = [*run.glob("world/*.jsonl"), *run.glob("world/index/**/*"), *run.glob("checkpoints/**/*")]
    return {path: path.stat().st_mtime_ns for path in files}


def test_one_command_builds_serves_trains_and_reports_and_the_next_reuses_it(
    start, tmp_path, monkeypatch, capfd
):
    run = tmp_path / "run"
    assert start("--steps=1", "--limit=4") == 0
    printed = capfd.readouterr().out
    for words in (
        "EM before",
        "EM after",
        "searches",
        "valid format",
        "one_hop",
        "seconds: world",
        "report:",
    ):
        assert words in printed
    assert "<html" in (run / "report.html").read_text(encoding="utf-8")
    assert [row["step"] for row in read_metrics(run) if "reward/mean" in row] == [1]
    assert read_run(run)["status"] == "finished"
    for name in ("before", "after"):
        assert read_json(run / "evaluations" / name / "scores.json")["n"] == 4
    assert set(read_json(run / "phases.json")["seconds"]) == {
        "world",
        "evaluate before",
        "train",
        "evaluate after",
        "report",
    }
    assert not (run / "server.port").exists()
    made = stamps(run)
    assert len(made) > 10
    monkeypatch.setattr(HFEngine, "generate", lambda *_: pytest.fail("something was asked again"))
    assert start("--steps=1", "--limit=4") == 0
    assert stamps(run) == made
    assert "EM before" in capfd.readouterr().out


@pytest.mark.slow
def test_a_start_that_was_interrupted_says_how_to_go_on_and_goes_on(start, tmp_path, monkeypatch, capfd):
    from rl.trainer import Trainer

    run, one_step = tmp_path / "run", Trainer._one_step

    async def interrupted(self):
        if self.step == 1:
            raise KeyboardInterrupt
        await one_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_one_step", interrupted)
        assert start() == 130
    said = capfd.readouterr().err.splitlines()[-1]
    assert (
        said == f"sleuth: interrupted; what is done is kept in {run}: start the same command again to go on"
    )
    assert read_run(run)["status"] == "interrupted"
    before = (run / "evaluations" / "before" / "scores.json").read_text()
    assert start() == 0
    assert (run / "evaluations" / "before" / "scores.json").read_text() == before
    assert [row["step"] for row in read_metrics(run) if "reward/mean" in row] == [1, 2, 3]


@pytest.mark.slow
def test_a_server_that_does_not_start_is_one_line(start, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(quickstart, "build_world", lambda folder: folder.mkdir(parents=True))
    assert start() == 2
    assert f"did not start: see {tmp_path / 'run' / 'server.log'}" in capfd.readouterr().err
    assert "sleuth: " in (tmp_path / "run" / "server.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "columns", [pytest.param(60, marks=pytest.mark.slow), 80, pytest.param(200, marks=pytest.mark.slow)]
)
def test_in_a_terminal_no_line_is_torn_and_no_figure_cut(recipe, tmp_path, monkeypatch, columns):
    monkeypatch.setattr(quickstart, "RECIPE", recipe)
    terminal = Terminal(columns)
    assert terminal.run("quickstart", f"--out={tmp_path / 'run'}", "--limit=3", "--steps=1") == 0
    shown = [line for line in terminal.lines if line.startswith("answering questions")]
    assert len(shown) == 2 and all("3/3" in line for line in shown)
    (trained,) = [line for line in terminal.lines if line.startswith("training  ")]
    assert "1/1" in trained
    seen = " ".join(terminal.lines)
    assert "…" not in seen and "searches" in seen and "difference" in seen
    for line in (f"step 1/1  {what}" for what in ("reward 0.", "dev EM 0.")):
        assert line in seen
