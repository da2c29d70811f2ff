"""`sleuth train --ray` on two nodes: the curve of one process, and whatever is killed, no hang.

Two trainers, two engines (vLLM's wire around the hf engine), two replicas of the retriever.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.checkpoint import latest_checkpoint
from data.run_dir import read_metrics
from tests.fake_vllm_server import write_python

pytest.importorskip("ray")
pytestmark = pytest.mark.slow
REPO = Path(__file__).parents[2]
DEADLINE_SECONDS = 420.0
"""Seconds of every wait: a step, a recovery, an end."""
RECIPE = {
    "rollout": {"questions_per_step": 8, "group_size": 4},
    "protocol": {"max_turns": 2, "top_k": 3},
    "algorithm": {"learning_rate": 0.0015},
    "device": "cpu",
    "save_every": 1,
}


@pytest.fixture
def start(toy, tmp_path):
    """Starts a command on the toy world; what still runs at the end of the test is killed."""
    started = []

    def command(out, *options):
        started.append(Command(toy, tmp_path / out, *options))
        return started[-1]

    yield command
    for each in started:
        each.process.kill()
        each.process.wait()


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes, either of which has room for all; the second is killed in a test."""
    utils = pytest.importorskip("ray.cluster_utils")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")  # else it kills where others fill the memory
    two = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 8})
    two.second = two.add_node(num_cpus=8)
    yield two
    two.shutdown()


class Command:
    """A `sleuth train` that runs beside the test, in a process group of its own."""

    def __init__(self, toy, out, *options):
        self.out, recipe = out, out.parent / f"{out.name}.yaml"
        places = {name: str(toy / file) for name, file in FILES.items()}
        recipe.write_text(json.dumps({**RECIPE, **places, "out": str(out)}))
        self.said = out.parent / f"{out.name}.said"
        with self.said.open("ab") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "scripts", "train", "--config", recipe, *map(str, options)],
                cwd=REPO,
                stdout=said,
                stderr=said,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def step(self):
        """The last that was logged."""
        return max((row["step"] for row in read_metrics(self.out)), default=0)

    def reaches(self, step):
        """Wait for a step."""
        self._until(lambda: self.step() >= step, f"step {step}")

    def goes_on(self):
        """Wait for two steps more: the second began after whatever has just happened."""
        self.reaches(self.step() + 2)

    def ends(self):
        """Its exit status."""
        return self.process.wait(DEADLINE_SECONDS)

    def _until(self, there, what):
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not there():
            assert self.process.poll() is None and time.monotonic() < deadline, f"no {what}: {self.told()}"
            time.sleep(0.1)

    def told(self):
        """Return what it said."""
        return self.said.read_text()[-3000:]

    def processes(self, *words, rank=None):
        """Those whose command line has all these words, of the trainer of a rank or of any kind."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal() or int(entry.name) == self.process.pid:
                continue
            line = _read(entry / "cmdline").replace("\0", " ")
            if line.startswith("sh -c") or not all(word in line for word in words):
                continue  # a shell waits beside each process for the end of its actor
            if rank is None or f"RANK={rank}" in _read(entry / "environ").split("\0"):
                found.append(int(entry.name))
        return sorted(found)

    def trainer(self, rank):
        """The process of a rank."""
        [pid] = self.processes(f"{self.out}/ray/train.yaml", rank=rank)
        return pid

    def engine(self, toy):
        """One of the engines."""
        return self.processes("tests.fake_vllm_server", str(toy / "policy"))[0]

    def replica(self, toy):
        """One of the replicas."""
        return self.processes("scripts serve", str(toy / "index"))[0]


FILES = {"policy": "policy", "questions": "train.jsonl", "retriever": "index"}


def _read(file):
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def parent(pid):
    """The process that started it: a Ray worker, for one of ours."""
    return int(_read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()[1])


def rewards(out):
    """Mean reward of each step."""
    return [row["reward/mean"] for row in read_metrics(out) if "reward/mean" in row]


def on_ray(tmp_path, address, *more):
    """The options of the layout under test."""
    python = write_python(tmp_path / "python")
    engines = ["--engine.name=vllm", "--engine.servers=2", f"--engine.python={python}"]
    places = ["--ray", address, "--ray.trainers=2", "--ray.retrievers=2", "--ray.spread=true"]
    return [*engines, *places, "--ray.start_seconds=300", "--engine.deadline_seconds=300", *more]


def test_two_nodes_have_the_curve_of_one_process_whatever_is_killed(start, toy, tmp_path, cluster):
    steps = 16
    alone = start("alone", f"--steps={steps}")
    assert alone.ends() == 0, alone.told()
    run = start("run", *on_ray(tmp_path, cluster.address, f"--steps={steps}"))
    kills = {
        "engine": lambda: os.kill(run.engine(toy), signal.SIGKILL),
        "replica": lambda: os.kill(run.replica(toy), signal.SIGKILL),
        "rank 1": lambda: os.kill(run.trainer(1), signal.SIGKILL),
        "rank 0": lambda: os.kill(run.trainer(0), signal.SIGKILL),
        "Ray worker of an engine": lambda: os.kill(parent(run.engine(toy)), signal.SIGKILL),
        "Ray worker of a rank": lambda: os.kill(parent(run.trainer(1)), signal.SIGKILL),
        "node": lambda: cluster.remove_node(cluster.second, allow_graceful=False),
    }
    run.reaches(1)
    for name, kill in kills.items():
        began = time.monotonic()
        kill()
        run.goes_on()
        print(f"{name}: two steps later after {time.monotonic() - began:.0f} s")
    assert run.ends() == 0, run.told()
    assert [row["step"] for row in read_metrics(run.out)] == list(range(1, steps + 1))
    assert rewards(run.out) == pytest.approx(rewards(alone.out), abs=0.1)
    assert not run.processes(str(run.out)) and not run.processes(str(toy / "policy"))


def test_ctrl_c_leaves_nothing_behind_and_the_same_command_goes_on(start, toy):
    options = ["--ray", "--ray.retrievers=1", "--steps=200"]
    run = start("run", *options)
    run.reaches(2)
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.ends() == 130, run.told()
    assert "the last checkpoint is kept in" in run.told().splitlines()[-1]
    saved = latest_checkpoint(run.out / "checkpoints")
    assert saved and saved.step >= 2
    assert not run.processes(str(run.out)) and not run.processes("scripts serve", str(toy))
    again = start("run", "--ray", f"--steps={saved.step + 1}", "--resume=true")
    assert again.ends() == 0, again.told()
    assert again.step() == saved.step + 1


def test_an_engine_that_never_starts_ends_the_run_in_one_line(start, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ValueError: no such model' >&2\nexit 3\n")
    python.chmod(0o755)
    engines = ["--engine.name=vllm", f"--engine.python={python}", "--ray.max_restarts=1"]
    run = start("run", "--ray", "--steps=1", *engines)
    assert run.ends() == 2
    assert (
        run.told()
        .splitlines()[-1]
        .startswith(
            "sleuth: ray: none of 1 servers is left: engine-0: exit status 3: ValueError: no such model (see"
        )
    )
    assert not run.processes(str(run.out))
