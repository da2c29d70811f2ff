"""The application: limits and failures, each answered with a status and a reason."""

import asyncio
import json
import threading
import time

import httpx
import pytest
from fastapi.testclient import TestClient

from data.errors import ConfigError
from data.records import Hit, Passage
from data.secret import read_secret
from retriever_server.retriever import Retriever
from retriever_server.retrievers.rerank import Rerank
from retriever_server.server.app import Limits, create_app
from retriever_server.server.backends import HotSwappable
from retriever_server.server.batching import Batching
from tests.retriever_server.retrievers.test_rerank import ByLetter


class Stub(Retriever):
    generation = "stub"

    def __init__(self) -> None:
        self.entered, self.release = threading.Event(), threading.Event()

    def search(self, queries, k, where=None):
        if "fail" in queries:
            raise ZeroDivisionError("oops")
        if "wait" in queries:
            self.entered.set()
            assert self.release.wait(timeout=20)
        found = where or {}
        return [[Hit(Passage(str(i), q, metadata=found), 1.0, "stub") for i in range(k)] for q in queries]


LIMITS = Limits(topk=2, max_topk=5, max_queries=3, max_query_chars=10, max_body_bytes=1000)


@pytest.fixture
def server():
    with TestClient(create_app(Stub(), LIMITS, {"kind": "stub"})) as client:
        yield client


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"queries": ["a"] * 4}, 422, "queries: 4, at most 3"),
        ({"queries": ["a" * 11]}, 422, "one of 11 characters, at most 10"),
        ({"queries": ["a"], "topk": 0}, 422, "topk = 0: must be from 1 to 5"),
        ({"queries": ["a"], "topk": 6}, 422, "topk = 6: must be from 1 to 5"),
        ({"queries": ["a"], "topk": -1}, 422, "topk = -1"),
        ({"queries": "a"}, 422, 'queries: Input should be a valid list, not "a"'),
        ({}, 422, "queries"),
        ([], 422, "body: must be a JSON object"),
        ({"queries": ["a"], "x": "y" * 1000}, 413, "body: more than 1000 bytes"),
        ({"queries": ["fail"]}, 503, "search failed: ZeroDivisionError: oops"),
    ],
)
def test_a_wrong_request_is_answered_with_a_reason(server, body, status, reason):
    answer = server.post("/retrieve", json=body)
    assert answer.status_code == status
    assert reason in answer.json()["detail"]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 900])
def test_what_is_not_json_is_answered_with_a_reason(server, body):
    answer = server.post("/retrieve", content=body)
    assert answer.status_code == 400
    assert "not JSON" in answer.json()["detail"]


@pytest.mark.parametrize(
    "kind", ["application/x-www-form-urlencoded", "text/plain", "multipart/form-data; boundary=x", "a"]
)
def test_a_body_is_json_whatever_its_type_says(server, kind):
    """As `curl -d` sends it."""
    body, headers = b'{"queries": ["a"]}', {"Content-Type": kind}
    assert server.post("/retrieve", content=body, headers=headers).status_code == 200
    assert server.post("/retrieve", content=body).status_code == 200


def test_a_query_that_is_no_unicode_is_refused(server):
    answer = server.post("/retrieve", content=b'{"queries": ["\\ud800"]}')
    assert answer.status_code == 422 and "half a surrogate pair" in answer.json()["detail"]


def test_a_filter_without_conditions_allows_all(server):
    assert len(server.post("/retrieve", json={"queries": ["a"], "where": {}}).json()["result"][0]) == 2


def test_topk_null_is_the_servers_default(server):
    for body in ({"queries": ["a"]}, {"queries": ["a"], "topk": None}):
        assert len(server.post("/retrieve", json=body).json()["result"][0]) == 2


def test_no_queries_no_rows(server):
    assert server.post("/retrieve", json={"queries": []}).json()["result"] == []


def test_health_and_info(server):
    assert server.get("/healthz").json() == {"status": "ok", "generation": "stub"}
    info = server.get("/v1/info").json()
    assert info["kind"] == "stub" and info["limits"]["max_top_k"] == 5
    assert "detail" in server.get("/nothing").json()
    assert server.head("/healthz").status_code == 200 and server.head("/retrieve").status_code == 405


def test_a_long_search_does_not_block_the_server():
    stub = Stub()
    with TestClient(create_app(stub, LIMITS)) as server:
        answers = []
        search = threading.Thread(
            target=lambda: answers.append(server.post("/retrieve", json={"queries": ["wait"]}))
        )
        search.start()
        assert stub.entered.wait(timeout=20)
        assert server.get("/healthz").status_code == 200  # while the search is under way
        assert not answers
        stub.release.set()
        search.join(timeout=20)
        assert answers[0].status_code == 200


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_queries": 0}, "max_queries = 0: must be >= 1"),
        ({"topk": 9, "max_topk": 5}, "topk = 9: must be <= max_topk = 5"),
    ],
)
def test_wrong_limits_are_refused(limits, message):
    with pytest.raises(ConfigError, match=message):
        Limits(**limits)


def test_a_query_that_fails_is_an_error_beside_the_others(server):
    body = {"queries": ["a", "fail"], "top_k": 1, "where": {"year": 1999}}
    answer = server.post("/v1/search", json=body)
    assert answer.status_code == 200
    good, bad = answer.json()["results"]
    assert good["error"] is None
    assert good["hits"] == [
        {
            "id": "0",
            "title": "",
            "text": "a",
            "metadata": {"year": 1999},
            "score": 1.0,
            "generation": "stub",
        }
    ]
    assert bad == {"hits": [], "error": "search failed: ZeroDivisionError: oops"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"where": {"year": {"near": 1}}}, "filter on 'year'"),
        ({"backend": "x"}, "backend 'x': must be one of default"),
        ({"deadline_seconds": 0}, "deadline_seconds: Input should be greater than 0"),
        ({"top_k": "3"}, "top_k: Input should be a valid integer"),
        ({"topk": 3}, "topk: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_native_search_is_answered_with_a_reason(server, change, reason):
    answer = server.post("/v1/search", json={"queries": ["a"], **change})
    assert answer.status_code == 422
    assert reason in answer.json()["detail"]


@pytest.mark.parametrize("seconds", ["x", "nan", "-1"])
def test_a_deadline_that_is_no_time_is_refused(server, seconds):
    headers = {"X-Deadline-Seconds": seconds}
    answer = server.post("/retrieve", json={"queries": ["a"]}, headers=headers)
    assert answer.status_code == 422 and "seconds > 0" in answer.json()["detail"]


def test_a_deadline_passes_with_504_and_the_server_goes_on():
    stub = Stub()
    with TestClient(create_app(stub, LIMITS, batching=Batching(threads=2))) as server:
        answer = server.post("/v1/search", json={"queries": ["wait"], "deadline_seconds": 0.05})
        assert answer.status_code == 504 and "no answer within 0.05 s" in answer.json()["detail"]
        header = {"X-Deadline-Seconds": "5"}
        assert server.post("/retrieve", json={"queries": ["a"]}, headers=header).status_code == 200
        stub.release.set()


def test_more_than_may_wait_is_sent_away_until_there_is_room():
    stub = Stub()
    app = create_app(stub, LIMITS, batching=Batching(max_batch=1, max_waiting=3))
    with TestClient(app) as server:
        asked = [threading.Thread(target=server.post, args=["/retrieve"], kwargs={"json": {"queries": q}})
                 for q in (["wait"], ["a", "b", "c"])]  # fmt: skip
        asked[0].start()
        assert stub.entered.wait(timeout=20)
        asked[1].start()
        while server.get("/readyz").status_code == 200:
            time.sleep(0.01)
        for path, query, status in (
            ("/v1/search", {"queries": ["d"]}, 429),
            ("/retrieve", {"queries": ["d"]}, 503),  # some clients take 429 for an answer without hits
            ("/search", {"query": "d"}, 503),
            ("/batch_search", {"query": ["d"]}, 503),
        ):
            answer = server.post(path, json=query)
            assert answer.status_code == status and int(answer.headers["Retry-After"]) >= 1
        stub.release.set()
        for thread in asked:
            thread.join(timeout=20)
        assert server.post("/retrieve", json={"queries": ["d"]}).status_code == 200


def test_queries_of_a_client_that_left_are_not_searched():
    """The one search thread is busy; who leaves meanwhile is taken out of the queue."""

    async def run() -> list[list[str]]:
        stub, seen = Stub(), []
        search = stub.search
        stub.search = lambda queries, k, where=None: (seen.append(queries), search(queries, k))[1]
        app = create_app(stub, LIMITS)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            first = asyncio.create_task(client.post("/retrieve", json={"queries": ["wait"]}))
            await asyncio.to_thread(stub.entered.wait, 20)
            status = await leave_early(app, {"queries": ["left"]})
            await asyncio.sleep(0)
            assert status == 499 and app.state.service.batcher.waiting == 0
            stub.release.set()
            assert (await first).status_code == 200
            assert (await client.post("/retrieve", json={"queries": ["a"]})).status_code == 200
            await app.state.service.batcher.close()
        return seen

    assert asyncio.run(run()) == [["wait"], ["a"]]


async def leave_early(app, body) -> int:
    """The status that a client would have got if it had not disconnected after sending its request."""
    messages = [{"type": "http.request", "body": json.dumps(body).encode()}, {"type": "http.disconnect"}]
    sent = []

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/retrieve", "raw_path": b"/retrieve", "headers": []}
    await app({**scope, "query_string": b"", "root_path": "", "http_version": "1.1"}, receive, send)
    return sent[0]["status"]


def test_a_token_guards_all_but_the_probes_and_the_page(tmp_path):
    (tmp_path / "token").write_text("s3cret\n")
    with TestClient(create_app(Stub(), token=read_secret(tmp_path / "token", "token_file"))) as server:
        for path in ("/healthz", "/readyz", "/"):
            assert server.get(path).status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
            answer = server.post("/retrieve", json={"queries": ["a"]}, headers=headers)
            assert answer.status_code == 401 and "bearer token" in answer.json()["detail"]
            assert server.get("/metrics", headers=headers).status_code == 401
        right = {"Authorization": "Bearer s3cret"}
        assert server.post("/retrieve", json={"queries": ["a"]}, headers=right).status_code == 200


@pytest.mark.parametrize(("content", "message"), [("", "one word"), ("a b", "one word"), ("ä", "not ASCII")])
def test_a_file_without_a_token_is_refused(tmp_path, content, message):
    (tmp_path / "token").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_secret(tmp_path / "token", "token_file")


def test_administration_needs_a_token(server):
    assert server.post("/admin/reload").status_code == 403


def test_the_request_log_has_a_line_a_request_and_no_queries(tmp_path):
    with TestClient(create_app(Stub(), request_log=tmp_path / "log.jsonl")) as server:
        answer = server.post("/retrieve", json={"queries": ["hush", "b"]}, headers={"X-Request-ID": "r1"})
        assert answer.headers["X-Request-ID"] == "r1"
        server.post("/retrieve", content=b"{")
    first, second = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert first["request_id"] == "r1" and first["queries"] == 2 and first["generation"] == "stub"
    assert (first["status"], second["status"]) == (200, 400)
    assert second["request_id"] and "hush" not in json.dumps(first)


def test_a_request_log_that_cannot_be_one_is_refused_before_anything_is_served(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"request_log .*file/log.jsonl: Not a directory"):
        create_app(Stub(), request_log=tmp_path / "file" / "log.jsonl")


def test_metrics_count_what_happened(server):
    server.post("/retrieve", json={"queries": ["a", "b", "b"]})
    server.post("/retrieve", json={"queries": ["fail"]})
    text = server.get("/metrics").text
    for line in (
        'sleuth_requests_total{route="/retrieve",status="200"} 1.0',
        'sleuth_requests_total{route="/retrieve",status="503"} 1.0',
        "sleuth_batch_queries_sum 3.0",  # a query asked twice is searched once
        "sleuth_failed_queries_total 1.0",
        "sleuth_waiting_queries 0.0",
        'sleuth_generation{backend="default",generation="stub"} 1.0',
    ):
        assert line in text, line


def test_metrics_tell_the_hits_of_a_cache_however_deep():
    class Counting(Stub):
        def describe(self):
            return {"parts": [{"kind": "Cached", "hits": 3, "misses": 4}, {"hits": 1, "misses": 1}]}

    with TestClient(create_app(Counting())) as server:
        text = server.get("/metrics").text
    assert 'sleuth_cache_hits{backend="default"} 4.0' in text
    assert 'sleuth_cache_misses{backend="default"} 5.0' in text


def test_the_page_needs_no_other_host(server):
    page = server.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "://" not in page.text and "//cdn" not in page.text


def test_the_description_has_examples_and_every_route():
    backends = {"default": HotSwappable(Stub()), "reranked": HotSwappable(Rerank(Stub(), ByLetter()))}
    with TestClient(create_app(backends)) as server:
        assert_described(server)


def assert_described(server):
    description = server.get("/openapi.json").json()
    assert "$defs" not in json.dumps(description)  # nothing is referred to that is not there
    assert {"/v1/search", "/retrieve", "/rerank", "/v1/embeddings", "/metrics"} <= set(description["paths"])
    body = description["paths"]["/v1/search"]["post"]["requestBody"]["content"]["application/json"]
    schema = description["components"]["schemas"][body["schema"]["$ref"].rpartition("/")[2]]
    for example in schema["examples"]:
        assert server.post("/v1/search", json=example).status_code == 200
