"""`sleuth serve --workers`: what cannot serve ends in one line, what dies or hangs is replaced."""

import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest

from data.errors import ConfigError
from retriever_server.retriever import Retriever
from retriever_server.server.metrics import share_metrics
from retriever_server.server.workers import Workers
from tests.processes import Forked, sleuth
from tests.retriever_server.running import PATIENCE_SECONDS, running_server, wait_until
from tests.samples import quick


class Faulty(Retriever):
    """Opens well in the first process; `fault` says what happens in its workers."""

    generation = "faulty"

    def __init__(self, fault: str = "", place: str = "") -> None:
        self.place = Path(place)
        if multiprocessing.parent_process() is None:
            return
        if fault == "refused":
            raise ConfigError("the disk has gone")
        if fault == "no memory":
            raise MemoryError("of 80 GB.*")
        if fault == "status":
            os._exit(7)
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "slow":
            time.sleep(PATIENCE_SECONDS)
        if fault == "short-lived":
            threading.Timer(1.0, os._exit, [9]).start()

    def search(self, queries, k, where=None):
        while "hang" in queries and not self.place.exists():
            time.sleep(0.05)
        return [[] for _ in queries]


def written(folder: Path, fault: str = "") -> Path:
    """The YAML file of a faulty retriever."""
    file = folder / "faulty.yaml"
    arguments = f"{{fault: '{fault}', place: '{folder / 'released'}'}}"
    file.write_text(
        f"class_path: tests.retriever_server.server.test_workers.Faulty\ninit_args: {arguments}\n"
    )
    return file


FAULTS = {
    "refused": "a worker cannot serve: .*the disk has gone",
    "no memory": "a worker cannot serve: .*MemoryError: of 80 GB.*",
    "status": "a worker cannot serve: ended with status 7",
    "killed": "a worker cannot serve: killed by SIGKILL",
}


@pytest.mark.parametrize("fault", quick(["refused"], FAULTS))
def test_workers_that_cannot_open_end_in_one_line(tmp_path, fault):
    process = sleuth("serve", "--index", written(tmp_path, fault), "--port", 0, "--workers", 2)
    out, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 2 and out == ""
    [line] = said.splitlines()
    assert re.search(f"^sleuth: {FAULTS[fault]}$", line)


@pytest.mark.slow
def test_a_worker_that_dies_again_and_again_ends_the_server(tmp_path):
    process = sleuth("serve", "--index", written(tmp_path, "short-lived"), "--port", 0, "--workers", 2)
    out, said = process.communicate(timeout=5 * PATIENCE_SECONDS)
    assert process.returncode == 2 and "serving faulty at" in out
    *told, last = said.splitlines()
    assert last == "sleuth: a worker died 5 times in a row, at last ended with status 9"
    assert sum("another takes its place" in line for line in told) >= 4


def test_who_stops_it_while_its_workers_start_does_not_wait_for_them(tmp_path):
    command = ("serve", "--index", written(tmp_path, "slow"), "--port", 0, "--workers", 2)
    with sleuth(*command) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while len(children.read_text().split()) < 2:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=PATIENCE_SECONDS / 2) == 0
        assert process.stdout.read() == ""


def test_while_a_search_hangs_the_server_is_not_ready_and_then_it_is_again(tmp_path):
    options = ["--batching.hang_seconds", "0.3"]
    with (
        running_server(written(tmp_path), *options, log=tmp_path / "log") as server,
        httpx.Client(base_url=server.url, timeout=PATIENCE_SECONDS) as client,
    ):
        assert client.get("/readyz").status_code == 200
        body = {"queries": ["hang"], "deadline_seconds": 0.1}
        assert client.post("/v1/search", json=body).status_code == 504
        wait_until(lambda: client.get("/readyz").status_code == 503)
        assert "a search has been under way for" in client.get("/readyz").json()["detail"]
        assert client.get("/healthz").status_code == 200
        wait_until(lambda: "a search has been under way for" in (tmp_path / "log").read_text())
        (tmp_path / "released").touch()
        wait_until(lambda: client.get("/readyz").status_code == 200)
        wait_until(lambda: "no search hangs any more" in (tmp_path / "log").read_text())
        assert client.post("/v1/search", json={"queries": ["a"]}).status_code == 200


def ail(settings, listener, pulse) -> None:
    """A worker that is well for a moment; settings: a folder in which each leaves its pid."""
    (Path(settings) / str(os.getpid())).touch()
    end = time.monotonic() + 1
    while time.monotonic() < end:
        pulse.beat()
        time.sleep(0.05)
    time.sleep(PATIENCE_SECONDS)


def mind(folder: Path) -> None:
    with share_metrics(), socket.create_server(("127.0.0.1", 0)) as listener:
        Workers(1, ail, str(folder), 60, 0.5, 5).run(listener, lambda: print("ready", flush=True))


@pytest.mark.slow
def test_a_worker_that_is_not_well_is_replaced(tmp_path):
    with Forked(mind, tmp_path) as process:
        assert process.stdout.readline() == "ready\n"
        wait_until(lambda: len(list(tmp_path.iterdir())) >= 2)
        process.terminate()
        assert process.wait(timeout=PATIENCE_SECONDS) == 0
        assert "has not been well for" in process.stderr.read()
    assert not any(Path(f"/proc/{pid.name}").exists() for pid in tmp_path.iterdir())
