"""`sleuth serve`, a real process: the contract, being stopped, killed and started again."""

import asyncio
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from data.errors import ConfigError
from retriever_server.client.search_client import connect
from retriever_server.client.wire import parse_hits
from retriever_server.indexes.base import open_index
from retriever_server.retriever import Retriever
from retriever_server.server.connections import listen
from scripts import serve
from scripts.serve import ServeConfig
from tests.retriever_server.running import TEXTS, build_small_index, running_server, start_server


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return build_small_index(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(index, tmp_path_factory):
    port_file = tmp_path_factory.mktemp("port") / "port"
    with running_server(index, "--port_file", str(port_file)) as running:
        assert port_file.read_text() == f"{running.port}\n"
        yield running


@pytest.mark.parametrize("number", [1, 2, 3, 100])
@pytest.mark.parametrize("scored", [True, False])
def test_the_search_r1_contract(server, index, number, scored):
    queries = (["fox", "sea", "nothing known", "blue"] * 25)[:number]
    body = {"queries": queries, "topk": 2, "return_scores": scored}
    answer = httpx.post(f"{server.url}/retrieve", json=body).json()
    expected = open_index(index).search(queries, 2)
    assert [[h.passage for h in row] for row in parse_hits(answer)] == [
        [h.passage for h in row] for row in expected
    ]
    first = answer["result"][0][0]
    assert set(first) == ({"document", "score"} if scored else {"id", "title", "text", "contents"})
    document = first["document"] if scored else first
    assert document["contents"] == f'"{document["title"]}"\n{document["text"]}'
    if scored:
        assert first["score"] == expected[0][0].score


def test_the_client_finds_over_http_what_the_index_finds(server, index):
    async def ask(spec: str):
        async with connect(spec) as client:
            queries = ("fox", "sea", "unknown")
            return await asyncio.gather(*(client.search(query, 3) for query in queries))

    over_http = asyncio.run(ask(server.url))
    assert over_http == asyncio.run(ask(str(index)))
    assert TEXTS[2] in [hit.passage.text for hit in over_http[0]]  # control tags pass unchanged


def test_it_says_in_one_line_what_is_served_where(server):
    assert server.line.startswith("serving 4 passages (bm25-")
    assert httpx.get(f"{server.url}/v1/info").json()["passages"] == 4
    assert "127.0.0.1" in server.url


@pytest.mark.slow
def test_a_client_waits_for_a_server_that_is_killed_and_started_again(index):
    async def ask(url: str, killed: threading.Event):
        async with connect(url, deadline_seconds=30) as client:
            assert await client.search("fox", 1)
            first.process.kill()
            first.process.wait(timeout=20)
            killed.set()
            return await client.search("sea", 1)

    with running_server(index) as first:
        killed = threading.Event()
        again = []

        def restart() -> None:
            assert killed.wait(timeout=20)
            again.append(start_server(index, port=first.port))

        restarting = threading.Thread(target=restart)
        restarting.start()
        try:
            hits = asyncio.run(ask(first.url, killed))
        finally:
            restarting.join(timeout=30)
            status = again[0].stop()
    assert "sea" in hits[0].passage.text
    assert status == 0


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_that_is_asked_for_is_no_failure(index, stop):
    with running_server(index) as server, httpx.Client() as kept_alive:
        assert kept_alive.get(f"{server.url}/healthz").status_code == 200
        assert server.stop(stop) == 0


@pytest.mark.slow
def test_a_port_in_use_is_one_clear_line(index, server):
    command = [sys.executable, "-m", "scripts", "serve", "--index", str(index)]
    done = subprocess.run([*command, "--port", str(server.port)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert f"cannot listen on 127.0.0.1:{server.port}: Address already in use" in line


def test_wrong_ports_hosts_and_limits_are_refused(index):
    with pytest.raises(ConfigError, match="port = 70000: must be from 0 to 65535"):
        serve.main(ServeConfig(str(index), port=70000))
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:0"):
        serve.main(ServeConfig(str(index), host="192.0.2.1", port=0))
    with pytest.raises(ConfigError, match="topk = 200: must be <= max_topk = 100"):
        serve.main(ServeConfig(str(index), topk=200))


def test_a_request_in_flight_is_finished_before_the_stop(index):
    """The request's body is still on its way when SIGTERM comes."""
    body = b'{"queries": ["fox"], "topk": 1}'
    with running_server(index) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = f"POST /retrieve HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body[:5])
            assert httpx.get(f"{server.url}/healthz").status_code == 200  # it has been read by now
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.TransportError):  # no new ones
                while True:
                    httpx.get(f"{server.url}/healthz")
            connection.sendall(body[5:])
            assert b"200 OK" in connection.recv(65536)
        assert server.process.wait(timeout=20) == 0


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_sigterm_says_unready_at_once_and_searches_go_on_until_the_stop(index, workers):
    with running_server(index, "--drain_seconds", "2", "--workers", workers) as server:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            assert client.get("/readyz").status_code == 200
            server.process.send_signal(signal.SIGTERM)
            server.process.send_signal(signal.SIGTERM)  # as when a whole group is told, and workers twice
            while client.get("/readyz").status_code == 200:
                assert server.process.poll() is None
            searched = 0
            with pytest.raises(httpx.TransportError):  # new clients, until nobody listens
                while True:
                    answer = httpx.post(f"{server.url}/retrieve", json={"queries": ["fox"]})
                    searched += answer.raise_for_status().is_success
                    assert httpx.get(f"{server.url}/healthz").status_code == 200
                    assert httpx.get(f"{server.url}/readyz").json() == {"detail": "the server is stopping"}
            assert searched
        assert server.process.wait(timeout=20) == 0


class Hanging(Retriever):
    """Never answers who looks for `hang`."""

    generation = "hanging"

    def search(self, queries, k, where=None):
        while "hang" in queries:
            time.sleep(1)
        return [[] for _ in queries]


def test_a_search_that_hangs_does_not_hold_up_the_stop(tmp_path):
    (tmp_path / "hanging.yaml").write_text("class_path: tests.scripts.test_serve.Hanging\n")
    with running_server(tmp_path / "hanging.yaml") as server:
        body = {"queries": ["hang"], "deadline_seconds": 0.1}
        assert httpx.post(f"{server.url}/v1/search", json=body).status_code == 504
        assert server.stop() == 0


def test_small_answers_are_sent_at_once():
    with (
        listen("127.0.0.1", 0) as listener,
        socket.create_connection(listener.getsockname()),
    ):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
