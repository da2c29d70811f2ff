"""Requests of thousands of queries: taken, searched in pieces, and no harm to those beside them."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fastapi.testclient import TestClient

from data.records import Hit, Passage
from retriever_server.retriever import Retriever
from retriever_server.server import middleware as guard
from retriever_server.server.app import Limits, create_app
from retriever_server.server.batching import Batching
from tests.retriever_server.running import PATIENCE_SECONDS, serving
from tests.samples import quick

MANY = [f"query {i}" for i in range(2560)]


class Echo(Retriever):
    """Finds the query, again and again; scores pairs by length; waits for `release`."""

    generation = "echo"

    def __init__(self) -> None:
        self.batches, self.entered, self.release, self.scorer = [], threading.Event(), threading.Event(), self
        self.release.set()

    def search(self, queries, k, where=None):
        self.batches.append(list(queries))
        self.entered.set()
        assert self.release.wait(timeout=PATIENCE_SECONDS)
        return [[Hit(Passage(str(i), query), 1.0, "echo") for i in range(k)] for query in queries]

    def score(self, pairs):
        self.batches.append(pairs)
        return [float(len(passage.contents)) for _, passage in pairs]


@pytest.fixture
def echo():
    retriever = Echo()
    yield retriever
    retriever.release.set()


@pytest.mark.parametrize("number", quick([513], [513, 2560, 5000]))
def test_as_many_queries_as_fit_the_body_are_taken_on_every_route_that_takes_several(echo, number):
    queries = [f"query {i}" for i in range(number)]
    with TestClient(create_app(echo)) as server:
        rows = server.post("/retrieve", json={"queries": queries, "topk": 2}).raise_for_status().json()
        assert [[document["text"] for document in row] for row in rows["result"]] == [[q, q] for q in queries]
        found = server.post("/batch_search", json={"query": queries}).raise_for_status().json()
        assert [row[0]["contents"] for row in found] == queries
        own = server.post("/v1/search", json={"queries": queries}).raise_for_status().json()
        assert [result["hits"][0]["text"] for result in own["results"]] == queries
    assert max(map(len, echo.batches)) <= Batching().max_batch


def test_so_are_the_pairs_of_a_reranker(echo):
    documents = [[{"contents": "x" * length} for length in range(1, 11)]] * 2560
    body = {"queries": MANY, "documents": documents, "rerank_topk": 3, "return_scores": True}
    with TestClient(create_app(echo)) as server:
        rows = server.post("/rerank", json=body).raise_for_status().json()["result"]
    assert [[hit["score"] for hit in row] for row in rows] == [[10.0, 9.0, 8.0]] * 2560
    assert max(map(len, echo.batches)) <= Batching().max_batch


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("/retrieve", {"queries": ["a"] * 11}, "queries: 11, at most 10 are allowed"),
        ("/retrieve", {"queries": ["a"] * 10, "topk": 3}, "queries: 10 of 3 hits each, at most 20 hits"),
        ("/access", {"urls": ["a"] * 11}, "urls: 11, at most 10 are allowed"),
        ("/rerank", {"query": "a", "texts": ["a"] * 21}, "21 pairs, at most 20 are allowed"),
    ],
)
def test_more_than_is_allowed_is_refused_and_never_cut(echo, path, body, reason):
    with TestClient(create_app(echo, Limits(max_queries=10, max_hits=20, topk=1))) as server:
        answer = server.post(path, json=body)
    assert answer.status_code == 422 and reason in answer.json()["detail"]
    assert not echo.batches


def test_large_requests_keep_nobody_out_of_the_queue_and_hold_up_nobody(echo):
    echo.release.clear()
    with serving(create_app(echo)) as url, ThreadPoolExecutor(8) as clients:

        def ask(queries: list[str], **more) -> httpx.Response:
            body = {"queries": queries, **more}
            return httpx.post(f"{url}/retrieve", json=body, timeout=PATIENCE_SECONDS)

        large = [clients.submit(ask, [f"{i} {query}" for query in MANY]) for i in range(4)]
        assert echo.entered.wait(timeout=PATIENCE_SECONDS)
        while httpx.get(f"{url}/readyz", timeout=PATIENCE_SECONDS).json()["waiting"] < 4 * 128 - 64:
            pass
        small = clients.submit(ask, ["small"])
        late = ask(MANY, deadline_seconds=0.05)
        while httpx.get(f"{url}/readyz", timeout=PATIENCE_SECONDS).json()["waiting"] < 4 * 128 - 64 + 1:
            pass
        echo.release.set()
        assert small.result().json()["result"][0][0]["text"] == "small"
        answers = [each.result().raise_for_status().json()["result"] for each in large]
    assert late.status_code == 504
    assert [[row[0]["text"] for row in rows] for rows in answers] == [
        [f"{i} {query}" for query in MANY] for i in range(4)
    ]
    [place] = [i for i, batch in enumerate(echo.batches) if "small" in batch]
    assert place < 14 < len(echo.batches) / 2


def test_bodies_are_held_within_bounds_and_small_ones_always_taken(echo, monkeypatch):
    monkeypatch.setattr(guard, "_BODIES_HELD", 2)
    echo.release.clear()
    app = create_app(echo, Limits(max_body_bytes=100_000))

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=None) as client:

            def ask(path: str, size: int):
                body = {"queries": ["q"], "padding": "x" * size}
                return asyncio.create_task(client.post(path, json=body))

            held = [ask("/retrieve", 90_000), ask("/retrieve", 90_000)]
            await asyncio.to_thread(echo.entered.wait, PATIENCE_SECONDS)
            refused, small = ask("/v1/search", 90_000), ask("/retrieve", 10)
            await asyncio.sleep(0)
            echo.release.set()
            answers = [await each for each in (*held, refused, small)]
            again = await ask("/retrieve", 90_000)
            await app.state.service.close()
            return [*answers, again]

    first, second, refused, small, again = asyncio.run(run())
    assert [each.status_code for each in (first, second, small, again)] == [200] * 4
    assert refused.status_code == 429 and refused.headers["Retry-After"] == "1"
