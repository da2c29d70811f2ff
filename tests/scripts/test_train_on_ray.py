"""Behaviour of the launcher of `sleuth train --ray` when its processes die, hang or cannot be placed.

Ray is a fake whose actors are threads; the processes are real ones that only act their parts.
"""

import os
import re
import signal
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.errors import ConfigError, RunStopped
from data.jsonl import read_json, write_json
from data.questions import load_questions
from data.run_dir import RunStatus, read_config, read_metrics
from retriever_server.client import pool, server_process
from retriever_server.client.server_process import Place
from rl.config import RayConfig, TrainConfig
from scripts.on_ray import launch as launcher
from scripts.on_ray import layout, ray_process, trainer
from scripts.train import expand, hash_inputs, open_run
from tests.toy import toy_config

PROGRAM = (
    f"#!{sys.executable} -SE"
    + '''
import os, pathlib, signal, sys, time
orders = pathlib.Path(os.environ["ORDERS"])

def obey(name):
    """Do what lies in a file of this name: once, unless its first word is `always`."""
    order = orders / name
    if order.exists():
        words = order.read_text().split()
        if words[0] != "always":
            order.rename(orders / f"{name}-begun")
        if words[-1] == "die":
            sys.exit("Error: told to die")
        if words[-1] == "stop":
            said = '"status": "stopped", "reason": "sentinel: no"'
            (out / "run.json").write_text('{"format_version": 1, %s}' % said)
            sys.exit(2)
        until = time.monotonic() + 99
        while time.monotonic() < until and not (words[-1] == "wait" and (orders / "go").exists()):
            time.sleep(0.01)

def replica():
    from http.server import BaseHTTPRequestHandler, HTTPServer
    class Well(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
        def log_message(self, *_): pass
    obey("replica")
    HTTPServer((sys.argv[sys.argv.index("--host") + 1], int(sys.argv[-3])), Well).serve_forever()

def trainer(rank):
    with (orders / f"starts-{rank}").open("a") as starts:
        starts.write("x")
    saved = out / "checkpoints"
    for step in range(len(list(saved.glob("step-*"))) + 1, 4):
        obey(f"rank-{rank}-step-{step}")
        folder = saved / f"step-{step:06d}"
        (orders / f"arrived-{rank}-{step}").touch()
        if rank == "0":
            while len(list(orders.glob(f"arrived-*-{step}"))) < int(os.environ["WORLD_SIZE"]):
                time.sleep(0.01)
            folder.mkdir(parents=True)
            (folder / "checkpoint.json").write_text('{"format_version": 1, "step": %d}' % step)
        while not folder.exists():
            time.sleep(0.01)

if "serve" in sys.argv:
    replica()
else:
    out = pathlib.Path(sys.argv[-1]).parents[1]
    trainer(os.environ["RANK"])
'''
)


class FakeRay:
    """As much of Ray as the launcher uses. `room` says whether there is any."""

    def __init__(self):
        names = ("GetTimeoutError", "RayTaskError")
        base = type("RayError", (Exception,), {})
        self.exceptions = SimpleNamespace(RayError=base, **{n: type(n, (base,), {}) for n in names})
        self.room = True
        self.actors: list[Handle] = []
        self.util = SimpleNamespace(
            placement_group=lambda bundles, strategy: SimpleNamespace(wait=lambda seconds: self.room),
            get_node_ip_address=lambda: "127.0.0.1",
            scheduling_strategies=SimpleNamespace(PlacementGroupSchedulingStrategy=lambda *_, **__: None),
        )

    def cluster_resources(self):
        return {"CPU": 3.0}

    def shutdown(self):
        """Nothing here."""

    def remote(self, kind):
        def make():
            self.actors.append(Handle(self, kind()))
            return self.actors[-1]

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=make))

    def get(self, future, timeout):
        try:
            return future.result(timeout)
        except TimeoutError:
            raise self.exceptions.GetTimeoutError from None
        except self.exceptions.RayError:
            raise
        except Exception as error:
            failed = self.exceptions.RayTaskError(str(error))
            failed.cause = error
            raise failed from error

    def kill(self, handle):
        handle.die()


class Handle:
    """An actor in a thread."""

    def __init__(self, ray, actor):
        self._ray, self._actor, self._alive = ray, actor, True
        self._thread = ThreadPoolExecutor(1)

    def __getattr__(self, name):
        def remote(*arguments):
            if self._alive:
                return self._thread.submit(getattr(self._actor, name), *arguments)
            lost: Future = Future()
            lost.set_exception(self._ray.exceptions.RayError("died"))
            return lost

        return SimpleNamespace(remote=remote)

    def hang(self):
        """Answer nothing any more."""
        self._thread = SimpleNamespace(submit=lambda *_: Future())

    def die(self):
        """As a killed process: the kernel closes what it had open."""
        self._alive = False
        child = self._actor.child
        if child is not None and child.process.stdin:
            child.process.stdin.close()


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Launches the run in `out`; `orders` holds what goes wrong, `ray` the fake."""
    ray, orders = FakeRay(), tmp_path / "orders"
    orders.mkdir()
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.util", ray.util)
    monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", ray.util.scheduling_strategies)
    monkeypatch.setattr(launcher, "connect_ray", lambda *_, **__: ray)
    monkeypatch.setattr(launcher, "LOOK_EVERY_SECONDS", 0.05)
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 5)
    monkeypatch.setattr(pool, "HEALTH_EVERY_SECONDS", 0.05)
    monkeypatch.setattr(pool, "LONGEST_PAUSE_SECONDS", 0.05)
    monkeypatch.setenv("ORDERS", str(orders))
    (tmp_path / "program").write_text(PROGRAM)
    (tmp_path / "program").chmod(0o755)
    monkeypatch.setattr(server_process, "sys", SimpleNamespace(executable=str(tmp_path / "program")))
    out = tmp_path / "out"

    def launch(**settings):
        values = {"trainers": 2, "retrievers": 2, "start_seconds": 20, **settings}
        config = TrainConfig("p", "q", "index", str(out), ray=RayConfig("local", **values))
        launcher.launch(config)

    yield SimpleNamespace(
        launch=launch,
        ray=ray,
        out=out,
        order=lambda name, what: (orders / name).write_text(what),
        wait_for=wait_for,
        begun=lambda name: orders / f"{name}-begun",
        starts=lambda rank: len((orders / f"starts-{rank}").read_text()),
    )
    deadline = time.monotonic() + 20
    while running(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)  # what was killed may be a moment about it
    assert not running(str(tmp_path))


def wait_for(path):
    """Return when it is there."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def running(*words):
    """The processes whose command line has all these words."""
    lines = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                lines[int(entry.name)] = (entry / "cmdline").read_text(errors="replace")
            except OSError:
                continue
    ours = {pid: line for pid, line in lines.items() if not line.startswith("sh\0-c")}  # but who waits beside
    return [pid for pid, line in ours.items() if all(word in line for word in words)]


def test_trainers_are_told_their_places_and_nothing_is_left(stage):
    stage.launch()
    assert stage.starts(0) == stage.starts(1) == 1
    places = read_json(stage.out / "ray" / "places.json")
    urls = places.pop("retriever").split(",")
    assert len(set(urls)) == 2 and all(url.startswith("http://127.0.0.1:") for url in urls)
    assert places == {"engines": None, "weights": None}
    assert {log.name for log in (stage.out / "logs").iterdir()} == {
        *("trainer-0.log", "trainer-1.log", "retriever-0.log", "retriever-1.log")
    }


@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_trainer_ends_the_others_and_all_begin_after_the_checkpoint(stage, rank, caplog):
    stage.order(f"rank-{rank}-step-2", "die")
    stage.launch(retrievers=0)
    assert stage.starts(0) == stage.starts(1) == 2
    assert f"trainer-{rank}: exit status 1: Error: told to die; all trainers begin again" in caplog.text


def test_without_a_new_checkpoint_it_ends_after_so_many_starts(stage):
    stage.order("rank-1-step-2", "always die")
    with pytest.raises(RunStopped, match=r"trainer-1: exit status 1: .* 3 times without a new .* step 1, in"):
        stage.launch(retrievers=0, max_restarts=2)
    assert stage.starts(1) == 4  # the first made a checkpoint


def test_what_would_stop_the_run_again_ends_it(stage):
    stage.order("rank-0-step-2", "stop")
    stage.order("rank-1-step-2", "always die")
    with pytest.raises(RunStopped, match=r"^sentinel: no$"):
        stage.launch(retrievers=0)
    assert stage.starts(0) == 1


def test_trainers_that_hang_are_started_again(stage, caplog):
    stage.order("rank-0-step-2", "hang")
    stage.launch(retrievers=0, quiet_seconds=1.0)
    assert stage.starts(0) == stage.starts(1) == 2
    assert "the trainers wrote nothing for ray.quiet_seconds = 1" in caplog.text


def test_a_dead_replica_is_started_at_its_url_and_the_trainers_go_on(stage, caplog):
    stage.order("rank-0-step-2", "wait")

    def kill_one():
        stage.wait_for(stage.begun("rank-0-step-2"))
        port = read_json(stage.out / "ray" / "places.json")["retriever"].rpartition(":")[2]
        [pid] = running("serve", f"--port\0{port}\0")
        os.kill(pid, signal.SIGKILL)
        while running("serve", f"--port\0{port}\0") in ([], [pid]):
            time.sleep(0.02)
        stage.order("go", "")

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    stage.launch(retrievers=1, quiet_seconds=30)
    thread.join()
    assert stage.starts(0) == 1
    assert "retriever-0: exit status -9: killed by SIGKILL; started again" in caplog.text


def test_a_replica_that_hangs_is_started_again(stage, caplog, monkeypatch):
    monkeypatch.setattr(pool, "HEALTH_TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(layout, "UNWELL_SECONDS", 0.5)
    stage.order("rank-0-step-2", "wait")

    def stop_one():
        stage.wait_for(stage.begun("rank-0-step-2"))
        [pid] = running("serve", str(stage.out.parent))
        os.kill(pid, signal.SIGSTOP)
        while running("serve", str(stage.out.parent)) in ([], [pid]):
            time.sleep(0.02)
        stage.order("go", "")

    threading.Thread(target=stop_one, daemon=True).start()
    stage.launch(retrievers=1)
    assert stage.starts(0) == 1
    assert re.search(r"retriever-0: no answer at http://\S+/readyz for \d s; started again", caplog.text)


@pytest.mark.parametrize(
    ("end", "says"),
    [
        ("hang", "its place does not answer within 0.5 s; all trainers begin again"),
        ("die", "its place is lost"),
    ],
)
def test_an_actor_that_hangs_or_dies_takes_its_process_along_and_another_is_made(
    end, says, stage, caplog, monkeypatch
):
    monkeypatch.setattr(ray_process, "PLACE_SECONDS", 0.5)
    stage.order("rank-1-step-3", "hang")

    def end_one():
        stage.wait_for(stage.begun("rank-1-step-3"))
        getattr(stage.ray.actors[1], end)()

    threading.Thread(target=end_one, daemon=True).start()
    stage.launch(retrievers=0)
    assert f"trainer-1: {says}" in caplog.text
    assert stage.starts(0) == stage.starts(1) == 2


def test_a_replica_that_never_starts_is_given_up_and_ends_the_run(stage):
    stage.order("replica", "always die")
    with pytest.raises(RunStopped, match=r"retriever-0: exit status 1: Error: told to die"):
        stage.launch(retrievers=1, max_restarts=1)
    assert not (stage.out / "ray" / "train.yaml").exists()  # no trainer was started


def test_a_replica_that_does_not_answer_in_time_ends_the_run(stage):
    stage.order("replica", "always hang")
    with pytest.raises(RunStopped, match=r"is there after 0.5 s: retriever-0.* \(ray.start_seconds = 0.5"):
        stage.launch(retrievers=1, start_seconds=0.5, max_restarts=9)


def test_no_room_is_said_before_anything_starts(stage):
    stage.ray.room = False
    with pytest.raises(ConfigError, match=r"no room in the cluster within 20 s for 4 processes with 4 CPUs"):
        stage.launch()


def test_a_process_does_not_outlive_its_place(tmp_path):
    place = Place()
    place.start(["sleep", "99.25"], {}, str(tmp_path), str(tmp_path / "log"))
    assert place.state() is None and place.child and place.child.process.stdin
    place.child.process.stdin.close()
    assert place.child.process.wait(20) == -signal.SIGKILL
    place.start(["sh", "-c", "echo first; echo last; exit 7"], {}, str(tmp_path), str(tmp_path / "log"))
    assert place.child.process.wait(20) == 7
    assert place.state() == (7, "last")
    assert "first" in (tmp_path / "log").read_text()
    with pytest.raises(ConfigError, match="nowhere: all machines must see it"):
        place.start(["true"], {}, str(tmp_path / "nowhere"), str(tmp_path / "log"))


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--ray"], ["--ray.address=local"]),
        (["--ray", "--steps", "3"], ["--ray.address=local", "--steps=3"]),
        (["--ray", "10.0.0.1:6379", "--steps", "3"], ["--ray.address=10.0.0.1:6379", "--steps=3"]),
        (["--ray=auto"], ["--ray.address=auto"]),
        (["--ray.trainers=2"], ["--ray.trainers=2"]),
    ],
)
def test_ray_needs_no_address_where_it_is_made_here(given, meant):
    assert expand(given) == meant


def test_a_retriever_that_is_served_already_needs_no_replicas(tmp_path):
    config = TrainConfig("p", "q", "http://a", str(tmp_path), ray=RayConfig("local", retrievers=2))
    with pytest.raises(ConfigError, match=r"ray.retrievers = 2: must be 0 where retriever is served already"):
        launcher.launch(config)


def test_a_trainer_searches_where_the_launcher_says_and_the_run_keeps_what_the_user_said(toy, tmp_path):
    config = replace(toy_config(toy, tmp_path / "run", steps=1), retriever="index-of-another-machine")
    questions = load_questions(config.questions)
    open_run(config, hash_inputs(config, questions, []), tracked=False).close(RunStatus.INTERRUPTED, "")
    places = {"engines": None, "retriever": str(toy / "index"), "weights": None}
    write_json(tmp_path / "run" / "ray" / "places.json", places)
    trainer.main(config)
    assert read_config(tmp_path / "run")["retriever"] == "index-of-another-machine"
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1]
