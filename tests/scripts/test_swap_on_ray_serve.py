"""The swap of `sleuth co-train` where Ray Serve holds the replicas, started as docs/serving.md says."""

import importlib
import re
import socket
import threading
from collections import Counter
from pathlib import Path

import httpx
import pytest

from retriever_server.indexes.manifest import read_manifest
from rl.co_training import live
from tests.retriever_server.running import build_numbered_index, wait_until

serve = pytest.importorskip("ray.serve")
pytestmark = pytest.mark.slow
DOCS = Path(__file__).parents[2] / "docs" / "serving.md"
REPLICAS = 2
NAMED = """
import os
from scripts import serve as ours

_build_app = ours.build_app

def build_app(config):
    app = _build_app(config)

    @app.middleware("http")
    async def name_the_replica(request, answer):
        reply = await answer(request)
        reply.headers["replica"] = str(os.getpid())
        return reply

    return app

ours.build_app = build_app
"""
"""In front of the program of the docs: each answer says which process gave it."""


@pytest.fixture
def place(tmp_path):
    """The place that is served: the first of two indexes, which lie beside it, and a token."""
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        build_numbered_index(tmp_path / str(number), number)
    live.put_in_place(tmp_path / "1" / "index", tmp_path / "place")
    (tmp_path / "token").write_text("word\n")
    return tmp_path / "place"


@pytest.fixture
def url(place, monkeypatch):
    """The address before the replicas."""
    import ray

    [program] = re.findall(r"```python\n(# ray_serve\.py\n.*?)```", DOCS.read_text(), re.DOTALL)
    settings = f'index="{place}", admin_token_file="{place.with_name("token")}"'
    program, put_in = re.subn(r'index="[^"]*"', settings, program)
    assert put_in == 1 and f"num_replicas={REPLICAS}" in program
    place.with_name("ray_serve.py").write_text(NAMED + program)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")  # else it kills where others fill the memory
    monkeypatch.setenv("PYTHONPATH", f"{place.parent}:{DOCS.parents[1]}")
    monkeypatch.syspath_prepend(str(place.parent))
    ray.init(num_cpus=4, include_dashboard=False, logging_level="warning")
    try:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(importlib.import_module("ray_serve").app)
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def ask(client, url):
    """Process and generation of an answer to a search."""
    answer = client.post(f"{url}/v1/search", json={"queries": ["w7"], "top_k": 1})
    assert answer.status_code == 200, answer.text
    return answer.headers["replica"], answer.json()["generation"]


def test_every_replica_answers_with_the_new_generation_and_no_request_fails(place, url):
    failures, over = [], threading.Event()

    def search():
        with httpx.Client(timeout=60) as client:
            while not over.is_set():
                try:
                    ask(client, url)
                except Exception as error:
                    failures.append(error)

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    with httpx.Client(timeout=60) as client:
        replicas = set()
        wait_until(lambda: replicas.add(ask(client, url)[0]) or len(replicas) == REPLICAS)
        for swap in range(6):
            index = place.with_name(str(2 - swap % 2)) / "index"
            live.put_in_place(index, place)
            new = read_manifest(index).generation
            live.reload(url, str(place.with_name("token")), new)
            answers = Counter(ask(client, url) for _ in range(60))
            assert {replica for replica, _ in answers} == replicas
            assert {generation for _, generation in answers} == {new}, answers
    over.set()
    for thread in threads:
        thread.join()
    assert not failures
