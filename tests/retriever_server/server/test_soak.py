"""Ten minutes of everything at once against one server: nothing fails, and its memory stays what it was."""

import contextlib
import os
import random
import socket
import statistics
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.retriever_server.running import (
    NUMBERED,
    RunningServer,
    build_numbered_index,
    checked_number,
    running_server,
)

SOAK_SECONDS = 600
WARM_UP_SECONDS = 120
GROWTH_BYTES = 8 << 20
"""Bytes that memory may grow by after the warm-up, some thousands of requests and 50 generations later."""

WRONG = [
    dict(content=b"{"),
    dict(content=b"\xff\x00"),
    dict(content=b"[" * 5000),
    dict(json={}),
    dict(json={"queries": "w1"}),
    dict(json={"queries": [None]}),
    dict(json={"queries": ["w1"], "top_k": -1, "topk": -1}),
    dict(json={"queries": ["w" * 9000]}),
    dict(content=b"x" * 70_000),
]


class Soak:
    """Clients of one server, each in a thread, until `stop`; what they did is counted."""

    def __init__(self, server: RunningServer) -> None:
        self.server, self.stop, self.errors = server, threading.Event(), []
        self.done = dict.fromkeys(("valid", "wrong", "gone"), 0)
        self.generations: dict[str, int] = {}

    def run(self, name: str, act) -> None:
        rng = random.Random(name)
        with httpx.Client(base_url=self.server.url, timeout=30) as client:
            while not self.stop.is_set():
                try:
                    act(client, rng)
                    self.done[name] += 1
                except Exception as error:  # pytest shows it at the end
                    self.errors.append(error)
                    self.stop.set()
                time.sleep(0.002)

    def valid(self, client: httpx.Client, rng: random.Random) -> None:
        ids = rng.sample(range(NUMBERED), rng.randint(1, 8))
        body = {"queries": [f"w{i}" for i in ids], "top_k": 2}
        generation, number = checked_number(
            client.post("/v1/search", json=body).raise_for_status().json(), ids
        )
        assert self.generations.setdefault(generation, number) == number
        for path in ("/metrics", "/v1/info", "/readyz", "/healthz", "/"):
            if rng.random() < 0.02:
                client.get(path).raise_for_status()

    def wrong(self, client: httpx.Client, rng: random.Random) -> None:
        path = rng.choice(["/v1/search", "/retrieve", "/access", "/rerank", f"/no/{rng.random()}"])
        assert 400 <= client.post(path, **rng.choice(WRONG)).status_code < 500

    def gone(self, _: httpx.Client, rng: random.Random) -> None:
        """Leave in the middle of a request, or before its answer."""
        body = b'{"queries": ["w1 w2", "w3"], "topk": 3}'
        request = b"POST /retrieve HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%s" % (
            len(body),
            body,
        )
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=30) as connection:
            connection.sendall(request[: rng.randint(1, len(request))])
            if rng.random() < 0.5:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_ten_minutes_of_everything_take_no_memory(tmp_path):
    build_numbered_index(tmp_path, 0)
    options = ["--watch_seconds", "0.2", "--max_body_bytes", "65536"]
    with running_server(tmp_path / "index", *options, log=tmp_path / "log") as server:
        soak, sizes, start, built = Soak(server), [], time.monotonic(), 0
        acts = {"valid": soak.valid, "wrong": soak.wrong, "gone": soak.gone}
        threads = [threading.Thread(target=soak.run, args=item) for item in acts.items()]
        for thread in threads:
            thread.start()
        while (elapsed := time.monotonic() - start) < SOAK_SECONDS and not soak.stop.wait(2):
            built += 1
            build_numbered_index(tmp_path, built)
            sizes.append((elapsed, resident_bytes(server.process.pid)))
        soak.stop.set()
        for thread in threads:
            thread.join(timeout=60)
        assert not soak.errors
        assert server.process.poll() is None and "Traceback" not in (tmp_path / "log").read_text()
    warm = [size for elapsed, size in sizes if elapsed >= WARM_UP_SECONDS]
    begin, end = statistics.median(warm[:10]), statistics.median(warm[-10:])
    swaps = f"{len(soak.generations)} of {built} generations"
    print(f"{soak.done}, {swaps}, {sizes[0][1]:,} {begin:,} {end:,} bytes")
    assert end - begin < GROWTH_BYTES, [size for _, size in sizes]
    assert min(soak.done.values()) > 1000 and len(soak.generations) > built / 2
