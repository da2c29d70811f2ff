"""The application: limits and failures, each answered with a status and a reason."""

import threading

import pytest
from fastapi.testclient import TestClient

from data.errors import ConfigError
from data.records import Hit, Passage
from retriever_server.app import Limits, create_app
from retriever_server.retriever import Retriever


class Stub(Retriever):
    generation = "stub"

    def __init__(self) -> None:
        self.entered, self.release = threading.Event(), threading.Event()

    def search(self, queries, k):
        if "fail" in queries:
            raise ZeroDivisionError("oops")
        if "wait" in queries:
            self.entered.set()
            assert self.release.wait(timeout=20)
        return [[Hit(Passage(str(i), q), 1.0, "stub") for i in range(k)] for q in queries]


LIMITS = Limits(default_top_k=2, max_top_k=5, max_queries=3, max_query_chars=10, max_body_bytes=1000)


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
        ({"queries": "a"}, 422, "queries: must be a list of strings"),
        ({}, 422, "queries"),
        ({"queries": ["a"], "x": "y" * 1000}, 413, "body: more than 1000 bytes"),
        ({"queries": ["fail"]}, 500, "search failed: ZeroDivisionError: oops"),
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
        ({"default_top_k": 9, "max_top_k": 5}, "default_top_k = 9: must be <= max_top_k = 5"),
    ],
)
def test_wrong_limits_are_refused(limits, message):
    with pytest.raises(ConfigError, match=message):
        Limits(**limits)
