"""The server benchmark: every load counts what was answered, and the peer finds what it should."""

import asyncio
import threading
from itertools import islice

import pytest
import uvicorn
from fastapi.testclient import TestClient

from data.corpus import Corpus
from data.jsonl import write_jsonl
from data.records import Hit, Passage
from retriever_server.encoders.loading import load_encoder
from retriever_server.indexes.flat import FlatIndex
from retriever_server.retriever import Retriever
from retriever_server.server.app import create_app
from retriever_server.server.batching import Batching
from retriever_server.server.config import Limits
from retriever_server.server.connections import listen
from scripts.bench.server import LOADS, drive, make_bodies, peer_app
from tests.retriever_server.tiny_encoders import WORDS, tiny_model


class Echo(Retriever):
    generation = "e"

    def search(self, queries, k, where=None):
        return [[Hit(Passage("1", query), 1.0, "e")] for query in queries]


@pytest.mark.parametrize("load", ["single", "batch"])
def test_every_request_is_answered_or_asked_again(load, monkeypatch):
    """The queue is shorter than the clients are many: some get a 429, none is lost."""
    monkeypatch.setitem(LOADS, "single", (8, 1))
    app = create_app(Echo(), Limits(max_queries=64), batching=Batching(max_waiting=64))
    with listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=[[listener]])
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        figures = asyncio.run(drive(url, load, ["a", "b"], 0.3, 1))
        server.should_exit = True
        thread.join(timeout=20)
    assert figures["requests"] >= LOADS[load][0] and figures["lost"] == 0
    assert set(figures["troubles"]) <= {"503"}


def test_no_query_is_asked_twice():
    assert len(set(islice(make_bodies(["a", "b"], 1, 3), 20))) == 20


def test_the_peer_finds_what_flat_finds(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", [{"id": str(i), "text": word} for i, word in enumerate(WORDS[:9])])
    encoder = load_encoder(tiny_model(tmp_path / "model", "dense"), query_prompt="", device="cpu")
    index = FlatIndex.build(Corpus(tmp_path / "corpus.jsonl"), tmp_path / "flat", encoder, "float32")
    queries = [f"{WORDS[3]} {WORDS[5]}", WORDS[7]]
    with TestClient(peer_app(index)) as server:
        answer = server.post("/retrieve", json={"queries": queries, "topk": 2, "return_scores": True})
    for row, hits in zip(answer.json()["result"], index.search(queries, 2), strict=True):
        assert [each["document"]["id"] for each in row] == [hit.passage.id for hit in hits]
        assert [each["score"] for each in row] == pytest.approx([hit.score for hit in hits], abs=1e-5)
