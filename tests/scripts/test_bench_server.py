"""The server benchmark: every load counts what was answered, and the peer finds what it should."""

import asyncio
import threading
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import uvicorn
from fastapi.testclient import TestClient

from data.jsonl import write_jsonl
from data.records import Hit, Passage
from retriever_server.app import create_app
from retriever_server.batching import Batching
from retriever_server.retriever import Retriever
from retriever_server.service import Limits
from scripts.bench.server import LOADS, drive, make_bodies, peer_app
from scripts.serve import _listen


class Echo(Retriever):
    generation = "e"

    def search(self, queries, k, where=None):
        return [[Hit(Passage("1", query), 1.0, "e")] for query in queries]


@pytest.mark.parametrize("load", ["single", "batch"])
def test_every_request_is_answered_or_asked_again(load, monkeypatch):
    """The queue is shorter than the clients are many: some get a 429, none is lost."""
    monkeypatch.setitem(LOADS, "single", (8, 1))
    app = create_app(Echo(), Limits(max_queries=64), batching=Batching(max_waiting=64))
    with _listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=[[listener]])
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        figures = asyncio.run(drive(url, load, ["a", "b"], 0.3, 1))
        server.should_exit = True
        thread.join(timeout=20)
    assert figures["requests"] >= LOADS[load][0] and figures["lost"] == 0
    assert set(figures["troubles"]) <= {"429"}


def test_no_query_is_asked_twice():
    assert len(set(islice(make_bodies(["a", "b"], 1, 3), 20))) == 20


def test_the_peer_ranks_by_inner_product(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", [{"id": str(i), "text": f"passage {i}"} for i in range(4)])

    class Index:
        encoder = SimpleNamespace(
            spec=SimpleNamespace(dimension=2), encode=lambda texts, role: [[0.0, 1.0]] * len(texts)
        )
        rows = np.array([[0, 1], [0, 3], [0, 2], [1, 0]], np.float32)
        corpus = SimpleNamespace(path=tmp_path / "corpus.jsonl")

        def __len__(self):
            return 4

    with TestClient(peer_app(Index())) as server:
        answer = server.post("/retrieve", json={"queries": ["a", "b"], "topk": 2, "return_scores": True})
    for row in answer.json()["result"]:
        assert [(hit["document"]["id"], hit["score"]) for hit in row] == [("1", 3.0), ("2", 2.0)]
