"""Connections: how many, how slow, and that nobody who behaves notices those who do not."""

import asyncio
import functools
import json
import logging
import resource
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn

from data.errors import ConfigError
from data.records import Hit, Passage
from retriever_server.retriever import Retriever
from retriever_server.server.app import create_app
from retriever_server.server.connections import BoundedProtocol, Bounds, connections_for
from scripts.bench.connections import drive
from scripts.serve import ServeConfig
from tests.retriever_server.running import (
    PATIENCE_SECONDS,
    build_small_index,
    running_server,
    wait_until,
)

QUERY = b'{"queries": ["a"]}'
HEAD = b"POST /retrieve HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"


class Long(Retriever):
    """Finds passages of 100,000 characters; `slow` takes a while."""

    generation = "long"

    def search(self, queries, k, where=None):
        if "slow" in queries:
            time.sleep(2)
        return [[Hit(Passage(str(i), "x" * 100_000), 1.0, "long") for i in range(k)] for _ in queries]


@contextmanager
def bounded(most: int = 1000, stall_seconds: float = 0.5):
    """The port of a server in a thread of this process, and the number of its connections."""
    http = functools.partial(BoundedProtocol, Bounds(most, stall_seconds))
    server = uvicorn.Server(uvicorn.Config(create_app(Long()), log_level="error", http=http, ws="none"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield listener.getsockname()[1], lambda: len(server.server_state.connections)
        finally:
            server.should_exit = True
            thread.join(timeout=PATIENCE_SECONDS)


def read_all(connection: socket.socket) -> bytes:
    """Whatever comes until the other end closes it."""
    connection.settimeout(PATIENCE_SECONDS)
    found = b""
    try:
        while chunk := connection.recv(65536):
            found += chunk
    except ConnectionResetError:
        pass
    return found


def trickle(connection: socket.socket, content: bytes, seconds: float) -> None:
    """Send a byte at a time until it is closed."""
    try:
        for byte in content:
            connection.sendall(bytes([byte]))
            time.sleep(seconds)
    except OSError:
        pass


STALLING = {
    "silent": (b"", b""),
    "half a head": (b"POST /retrieve HT", b""),
    "a head without end": (b"POST /retrieve HTTP/1.1\r\n", b"X-Slow: loris\r\n" * 1000),
    "no body": (HEAD % 1000, b""),
    "a body without end": (HEAD % 100_000, b"x" * 10_000),
    "a chunked body without end": (
        b"POST /retrieve HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"1\r\nx\r\n" * 1000,
    ),
    "half a head after an answer": (HEAD % len(QUERY) + QUERY + b"GET /hea", b"X" * 1000),
}


@pytest.mark.parametrize("kind", STALLING)
def test_who_does_not_finish_a_request_is_closed(kind):
    first, rest = STALLING[kind]
    with bounded() as (port, count), socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(first)
        sender = threading.Thread(target=trickle, args=(connection, rest, 0.02), daemon=True)
        sender.start()
        assert b"408 Request Timeout" in read_all(connection)[-300:]
        wait_until(lambda: count() == 0)


def test_who_does_not_read_an_answer_is_closed():
    body = json.dumps({"queries": ["a"] * 10, "topk": 20}).encode()  # an answer of 20 MB
    with bounded() as (port, count), socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(HEAD % len(body) + body)
        wait_until(lambda: count())
        wait_until(lambda: count() == 0)
        answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 200") and len(answer) < 20_000_000


def test_who_reads_an_answer_slowly_but_surely_has_all_of_it():
    body = json.dumps({"queries": ["a"], "topk": 90}).encode()  # 9 MB
    with bounded(stall_seconds=0.4) as (port, _), socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.connect(("127.0.0.1", port))
        connection.sendall(HEAD % len(body) + body)
        connection.settimeout(PATIENCE_SECONDS)
        found = 0
        while found < 9_000_000:
            chunk = connection.recv(100_000)
            assert chunk
            found += len(chunk)
            time.sleep(0.01)


def test_who_waits_for_a_search_or_is_idle_between_two_is_left_alone():
    with bounded(stall_seconds=0.2) as (port, _), httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        answer = client.post("/retrieve", json={"queries": ["slow"]}, timeout=PATIENCE_SECONDS)
        assert answer.status_code == 200
        [kept] = client._transport._pool.connections
        time.sleep(1)
        assert client.get("/healthz").status_code == 200
        assert client._transport._pool.connections == [kept]  # on the same connection


def send_on_and_on(connection: socket.socket, content: bytes, times: int) -> None:
    """Raises OSError once it is closed, AssertionError where it is not."""
    for _ in range(times):
        connection.sendall(content)
        time.sleep(0.001)
    raise AssertionError("all of it was taken")


def test_a_head_without_end_is_refused_however_fast_it_comes():
    with bounded(stall_seconds=60) as (port, _), socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        with pytest.raises(OSError):
            send_on_and_on(connection, b"X-Many: headers and headers\r\n" * 1000, times=3000)


def test_requests_that_do_not_wait_for_answers_are_bounded():
    with bounded(stall_seconds=60) as (port, _), socket.create_connection(("127.0.0.1", port)) as connection:
        slow = b'{"queries": ["slow"]}'
        connection.sendall(HEAD % len(slow) + slow)
        with pytest.raises(OSError):
            send_on_and_on(connection, (HEAD % len(QUERY) + QUERY) * 100, times=1000)


def test_connections_beyond_the_bound_are_told_so_and_the_others_served(caplog, monkeypatch):
    monkeypatch.setattr("retriever_server.server.connections._TOLD_EVERY_SECONDS", 0.1)
    with bounded(most=3, stall_seconds=30) as (port, count):
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url) as kept, httpx.Client(base_url=url) as other:
            held = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
            assert kept.get("/healthz").status_code == 200
            wait_until(lambda: count() >= 3)
            for _ in range(3):
                answer = other.get("/healthz")
                assert answer.status_code == 503 and answer.headers["Retry-After"] == "1"
                assert "too many connections" in answer.json()["detail"]
                assert kept.get("/healthz").status_code == 200
            held.pop().close()
            wait_until(lambda: count() <= 2)
            assert other.get("/healthz").status_code == 200
            wait_until(lambda: "closed connections: " in caplog.text)
            held.pop().close()


def test_what_is_closed_is_counted_in_the_log(caplog, monkeypatch):
    monkeypatch.setattr("retriever_server.server.connections._TOLD_EVERY_SECONDS", 0.1)
    caplog.set_level(logging.WARNING)
    with bounded(stall_seconds=0.2) as (port, _):
        held = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
        wait_until(lambda: "stalled in the head" in caplog.text)
        for connection in held:
            connection.close()
    assert "closed connections: " in caplog.text


def test_clients_that_keep_their_connections_notice_nothing_of_those_that_stall(tmp_path):
    """As `python -m scripts.bench.connections` does with 5,000 and 1,200."""
    with running_server(build_small_index(tmp_path), "--stall_seconds", "1") as server:
        found = asyncio.run(drive(server.url, clients=150, slow=40, requests=4, pause_seconds=1))
    assert found["errors"] == 0 and found["answers"] == {"200": 600}
    assert found["closed"]["silent"] == found["closed"]["head"] == 10


@pytest.mark.slow
def test_the_limit_of_open_files_is_raised_at_the_start(tmp_path):
    index = build_small_index(tmp_path)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    code = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard}))\n"
        "from scripts.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "serve", "--index", str(index), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        url = process.stdout.readline().split()[-1]
        httpx.get(f"{url}/healthz", timeout=PATIENCE_SECONDS)
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        process.terminate()
        log = process.stderr.read()
    [row] = [line.split() for line in limits.splitlines() if line.startswith("Max open files")]
    assert int(row[3]) == wanted
    said = next(line for line in log.splitlines() if "connections" in line)
    assert wanted - 1000 < int(said.split()[-2]) < wanted


def test_connections_leave_room_for_files():
    assert 0 < connections_for(1024) < 1024 - 128
    assert connections_for(10) == 1


@pytest.mark.parametrize("change", [{"max_connections": -1}, {"stall_seconds": 0}])
def test_wrong_bounds_are_refused(change):
    with pytest.raises(
        ConfigError, match=r"max_connections = -1: must be >= 0|stall_seconds = 0: must be > 0"
    ):
        ServeConfig("x", **change)


def test_a_client_that_leaves_behind_several_requests_is_no_error(capsys):
    slow = b'{"queries": ["slow"]}'
    with bounded(stall_seconds=10) as (port, count):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(HEAD % len(slow) + slow + HEAD % len(QUERY) + QUERY)
            wait_until(lambda: count())
            time.sleep(0.3)  # both are there
        wait_until(lambda: count() == 0)
        time.sleep(2.5)  # until the search is done
        assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
    assert "Traceback" not in capsys.readouterr().err
