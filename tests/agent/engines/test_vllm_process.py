"""Servers that were started here and die, or hang, are started again; the others go on meanwhile.

The server is a small program of the standard library that speaks as much of vLLM's wire as is asked here.
"""

import asyncio
import logging
import os
import signal
import sys
import time

import httpx
import pytest

from agent.engines.base import Sampling
from agent.engines.transport import FolderTransport
from agent.engines.vllm import VLLMEngine
from agent.engines.vllm_process import server_command, start_servers
from data.errors import EngineError
from retriever_server.client import pool

SERVER = """#!{python}
import json, sys, os, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
state = {{"version": "default", "folder": None}}
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.answer({{"data": [{{"id": "m", "max_model_len": 64}}], "pid": os.getpid(), **state}})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{{}}")
        if self.path.startswith("/collective_rpc"):
            state["folder"] = body["kwargs"]["weights_path"]
            assert os.path.exists(state["folder"])
        if self.path == "/update_weight_version":
            state["version"] = body["new_version"]
        ids = [3, 4]
        choice = dict(token_ids=ids, logprobs=dict(content=[dict(token_id=i, logprob=-1) for i in ids]),
                      finish_reason="stop", weight_versions=[dict(version=state["version"])])
        if body.get("token_ids") == [6]:
            print("RuntimeError: killed by a prompt", flush=True)
            os._exit(1)
        self.answer(dict(choices=[choice], success=True))
    def answer(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def log_message(self, *_): pass
ThreadingHTTPServer.allow_reuse_address = True
print("starting", flush=True)
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def run(act, count, tmp_path, monkeypatch, hang_seconds=None, **limits):
    """Return what `act(engine, started)` gives for an engine over so many started servers."""
    monkeypatch.setattr(pool, "HEALTH_EVERY_SECONDS", 0.05)
    monkeypatch.setattr(pool, "HEALTH_TIMEOUT_SECONDS", 0.5)
    python = tmp_path / "python"
    python.write_text(SERVER.format(python=sys.executable))
    python.chmod(0o755)
    started = start_servers(server_command(str(python), "m", "float32"), {}, count, tmp_path)
    transport = FolderTransport(lambda folder, state: folder.mkdir(parents=True), tmp_path / "weights")

    async def live():
        engine = VLLMEngine(started, [], transport, 20, **limits)
        if hang_seconds:
            engine.pool.hang_seconds = hang_seconds
        try:
            return await act(engine, started)
        finally:
            await engine.close()

    return asyncio.run(live())


async def until(condition):
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


def ask(engine, name, prompt=(1, 2)):
    return engine.generate(list(prompt), Sampling(max_tokens=2), name)


def test_a_server_that_dies_is_started_again_at_its_place_with_the_newest_weights(tmp_path, monkeypatch):
    async def act(engine, started):
        await engine.update_weights(None, 3)
        servers = engine.pool.servers
        before = [(await server.get("/info"))["pid"] for server in servers]
        os.kill(before[0], signal.SIGKILL)
        meanwhile = await asyncio.gather(*(ask(engine, str(n)) for n in range(6)))
        await until(lambda: len(engine.pool.live) == 2 and started[0].restarts == 1)
        after = [await server.get("/info") for server in servers]
        await engine.update_weights(None, 4)
        return before, meanwhile, after, [(await server.get("/info"))["version"] for server in servers]

    before, meanwhile, after, last = run(act, 2, tmp_path, monkeypatch)
    assert all(c.token_ids == [3, 4] and c.weights_version == 3 for c in meanwhile)
    assert after[1]["pid"] == before[1] and after[0]["pid"] != before[0]
    assert after[0]["version"] == "3" and after[0]["folder"].endswith("weights-000003")
    assert last == ["4", "4"]
    log = (tmp_path / "vllm-0.log").read_text()
    assert log.count("starting") == 2
    assert (tmp_path / "vllm-1.log").read_text().count("starting") == 1


def test_the_only_server_is_waited_for(tmp_path, monkeypatch):
    async def act(engine, started):
        await engine.update_weights(None, 1)
        os.kill((await engine.pool.servers[0].get("/info"))["pid"], signal.SIGKILL)
        completion = await ask(engine, "a")
        os.kill((await engine.pool.servers[0].get("/info"))["pid"], signal.SIGKILL)
        await engine.update_weights(None, 2)
        return completion.weights_version, (await ask(engine, "b")).weights_version

    assert run(act, 1, tmp_path, monkeypatch) == (1, 2)


def test_one_that_keeps_dying_is_given_up_with_its_last_words(tmp_path, monkeypatch, caplog):
    async def act(engine, started):
        with pytest.raises(
            EngineError, match=r"none of 1 servers is left: vllm-0: exit status 1: RuntimeError: killed by"
        ):
            await ask(engine, "a", [6])  # it dies of it, every time
        return started[0].restarts

    with caplog.at_level(logging.WARNING):
        assert run(act, 1, tmp_path, monkeypatch, max_restarts=2) == 2
    assert "exit status 1: RuntimeError: killed by a prompt; started again" in caplog.text
    assert "killed by a prompt; given up after 2 restarts" in caplog.text


def test_one_that_hangs_is_killed_and_started_again(tmp_path, monkeypatch):
    async def act(engine, started):
        await engine.start()
        os.kill((await engine.pool.servers[0].get("/info"))["pid"], signal.SIGSTOP)
        await until(lambda: started[0].restarts == 1)
        return (await ask(engine, "a")).token_ids

    assert run(act, 1, tmp_path, monkeypatch, hang_seconds=0.5) == [3, 4]


def test_closing_ends_what_was_started_again(tmp_path, monkeypatch):
    async def act(engine, started):
        await engine.start()
        os.kill((await engine.pool.servers[0].get("/info"))["pid"], signal.SIGKILL)
        await until(lambda: started[0].restarts == 1 and engine.pool.live)
        return started

    started = run(act, 1, tmp_path, monkeypatch)
    [server] = started
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")
    assert server.process.place.child.status is not None
