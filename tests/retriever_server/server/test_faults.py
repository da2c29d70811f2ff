"""Faults around a server, by HTTP: shards slow and dead, an encoder that fails, rude clients."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from data.corpus import Corpus
from data.records import Hit, Passage
from retriever_server.indexes.flat import FlatIndex
from retriever_server.retriever import Retriever
from retriever_server.retrievers.remote import Remote
from retriever_server.retrievers.shard import Sharded
from retriever_server.server.app import Limits, create_app
from retriever_server.server.batching import Batching
from tests.retriever_server.running import PATIENCE_SECONDS, serving, wait_until, write_numbered_corpus
from tests.retriever_server.tiny_encoders import FakeEncoder


class Echo(Retriever):
    """Finds the query; waits for `release` where that is `wait`."""

    generation = "echo"

    def __init__(self) -> None:
        self.seen, self.entered, self.release = [], threading.Event(), threading.Event()

    def search(self, queries, k, where=None):
        self.seen += queries
        if "wait" in queries:
            self.entered.set()
            assert self.release.wait(timeout=PATIENCE_SECONDS)
        return [[Hit(Passage(query, query), 1.0, "echo")] for query in queries]


@pytest.fixture
def echo():
    """Released at the end, whatever happened: its server stops."""
    retriever = Echo()
    yield retriever
    retriever.release.set()


def post(url: str, path: str, **body) -> httpx.Response:
    return httpx.post(f"{url}{path}", json=body, timeout=PATIENCE_SECONDS)


@pytest.mark.parametrize("fault", ["slow", "dead"])
@pytest.mark.parametrize("allow_partial", [False, True])
def test_a_slow_or_dead_shard_is_named_in_the_answer(echo, fault, allow_partial):
    whole = Echo()
    with serving(create_app(echo)) as shard_url:
        if fault == "dead":
            with socket.create_server(("127.0.0.1", 0)) as closed_at_once:
                shard_url = f"http://127.0.0.1:{closed_at_once.getsockname()[1]}"
        shard = Remote(shard_url, deadline_seconds=0.2 if fault == "dead" else PATIENCE_SECONDS)
        # Long enough for the part that answers, where it may.
        seconds = PATIENCE_SECONDS if fault == "dead" else 1 if allow_partial else 0.2
        sharded = Sharded([whole, shard], seconds, allow_partial)
        whole.release.set()
        with serving(create_app(sharded)) as url:
            found = post(url, "/v1/search", queries=["wait"]).json()["results"][0]
            contract = post(url, "/retrieve", queries=["wait"])
            echo.release.set()
            text = httpx.get(f"{url}/metrics", timeout=PATIENCE_SECONDS).text
    if allow_partial:
        assert found["error"] is None and contract.status_code == 200
        assert [hit["generation"] for hit in found["hits"]] == ["sharded(echo+missing part 2)"]
        assert 'sleuth_partial_searches{backend="default"} 2.0' in text
    else:
        assert found["hits"] == [] and "part 2 of 2" in found["error"]
        assert contract.status_code == 503 and "part 2 of 2" in contract.json()["detail"]


class Failing(FakeEncoder):
    """Fails whenever one of the queries is `bad`; records what it encoded at once."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = []

    def encode(self, texts, role):
        self.batches.append(sorted(texts))
        if "bad" in texts:
            raise ZeroDivisionError("no vector")
        return super().encode(texts, role)


def test_an_encoder_that_fails_on_one_query_fails_that_alone(tmp_path):
    encoder = Failing()
    index = FlatIndex.build(Corpus(write_numbered_corpus(tmp_path, 1)), tmp_path / "index", encoder)
    app = create_app(index, batching=Batching(max_batch=4, window_seconds=1))
    asked = [("/retrieve", ["w1"]), ("/retrieve", ["bad"]), ("/v1/search", ["w2", "bad"])]
    one = {"/retrieve": {"topk": 1}, "/v1/search": {"top_k": 1}}
    with serving(app) as url, ThreadPoolExecutor(3) as clients:
        while ["bad", "w1", "w2"] not in encoder.batches:  # until they travel together
            answers = clients.map(lambda each: post(url, each[0], queries=each[1], **one[each[0]]), asked)
            good, bad, native = answers
            assert good.status_code == 200 and good.json()["result"][0][0]["id"] == "1"
            assert bad.status_code == 503 and "ZeroDivisionError: no vector" in bad.json()["detail"]
            found = native.raise_for_status().json()["results"]
            assert found[0]["hits"][0]["id"] == "2" and found[0]["error"] is None
            assert found[1] == {"hits": [], "error": "search failed: ZeroDivisionError: no vector"}


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused_and_the_next_is_read(echo, chunked):
    body = json.dumps({"queries": ["a"], "padding": "x" * 200_000}).encode()
    with serving(create_app(echo, Limits(max_body_bytes=100_000))) as url, httpx.Client() as client:
        content = iter([body[i : i + 1000] for i in range(0, len(body), 1000)]) if chunked else body
        answer = client.post(f"{url}/retrieve", content=content)
        assert answer.status_code == 413 and "more than 100000 bytes" in answer.json()["detail"]
        assert client.post(f"{url}/retrieve", json={"queries": ["b"]}).status_code == 200
    assert echo.seen == ["b"]


def test_who_disconnects_is_forgotten_and_nobody_else_notices(echo):
    """One in the middle of its body, one while its query waits for the busy search thread."""
    app = create_app(echo)
    body = b'{"queries": ["left"]}'
    request = b"POST /retrieve HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
    with serving(app) as url, ThreadPoolExecutor(1) as clients:
        first = clients.submit(post, url, "/retrieve", queries=["wait"])
        assert echo.entered.wait(timeout=PATIENCE_SECONDS)
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with socket.create_connection(address) as whole, socket.create_connection(address) as half:
            whole.sendall(request)
            half.sendall(request[:-5])
            wait_until(lambda: app.state.service.batcher.waiting == 1)
        wait_until(lambda: app.state.service.batcher.waiting == 0)
        gone = 'sleuth_requests_total{route="/retrieve",status="499"} 2.0'
        wait_until(lambda: gone in httpx.get(f"{url}/metrics", timeout=PATIENCE_SECONDS).text)
        echo.release.set()
        assert first.result().status_code == 200
        assert post(url, "/retrieve", queries=["b"]).status_code == 200
    assert echo.seen == ["wait", "b"]
