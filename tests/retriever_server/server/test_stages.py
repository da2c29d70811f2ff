"""Stages of `POST /v1/search`: one backend finds, the reranker of another orders; all of it reported."""

import pytest
from fastapi.testclient import TestClient

from retriever_server.retrievers.cache import Cached
from retriever_server.retrievers.rerank import Rerank
from retriever_server.server.app import Limits, create_app
from retriever_server.server.backends import HotSwappable
from tests.retriever_server.retrievers.test_compose import A, Fixed
from tests.retriever_server.retrievers.test_rerank import ByLetter


class Broken(ByLetter):
    """Has no number for one query."""

    name = "broken"

    def score(self, pairs):
        if any(query == "fail" for query, _ in pairs):
            raise ZeroDivisionError("oops")
        return super().score(pairs)


@pytest.fixture
def server():
    backends = {
        "bm25": HotSwappable(Fixed("g", A)),
        "reranked": HotSwappable(Cached(Rerank(Fixed("h", {"x": 1.0}), ByLetter(), depth=2))),
        "broken": HotSwappable(Rerank(Fixed("h", A), Broken())),
    }
    with TestClient(create_app(backends, Limits(topk=1, max_topk=5))) as client:
        yield client


def search(server, stages, **more):
    answer = server.post("/v1/search", json={"queries": ["p"], "stages": stages, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_one_backend_finds_and_the_reranker_of_another_orders(server):
    found = search(server, [{"retrieve": "bm25", "k": 3}, {"rerank": "reranked", "k": 2}])
    (result,) = found["results"]
    assert [hit["id"] for hit in result["hits"]] == ["z", "y"]
    name = "rerank(g, letters, 3)"
    assert {hit["generation"] for hit in result["hits"]} == {name} == {found["generation"]}
    assert found["backend"] == "bm25"
    assert found["stages"] == [
        {"retrieve": "bm25", "k": 3, "generation": "g"},
        {"rerank": "reranked", "k": 2, "generation": name},
    ]


def test_what_a_stage_does_not_say_is_what_the_next_looks_at(server):
    found = search(server, [{"retrieve": "bm25"}, {"rerank": "reranked"}])
    assert [stage["k"] for stage in found["stages"]] == [2, 1]
    assert [hit["id"] for hit in found["results"][0]["hits"]] == ["y"]
    assert "stages" not in server.post("/v1/search", json={"queries": ["p"]}).json()
    assert [stage["k"] for stage in search(server, [{"retrieve": "bm25"}], top_k=2)["stages"]] == [2]


def test_a_query_that_a_reranker_fails_on_fails_alone(server):
    body = {"queries": ["p", "fail"], "stages": [{"retrieve": "bm25"}, {"rerank": "broken", "k": 1}]}
    good, bad = server.post("/v1/search", json=body).json()["results"]
    assert good["hits"][0]["id"] == "z" and bad["error"] == "search failed: ZeroDivisionError: oops"


@pytest.mark.parametrize(
    ("stages", "reason"),
    [
        ([], "stages: List should have at least 1"),
        ([{"rerank": "reranked"}], "stages.0: must name a backend by `retrieve`"),
        ([{"retrieve": "bm25"}, {"retrieve": "bm25"}], "stages.1: must name a backend by `rerank`"),
        ([{"retrieve": "bm25", "rerank": "reranked"}], "stages.0: must name a backend by `retrieve`, and by"),
        ([{"retrieve": "x"}], "backend 'x': must be one of bm25, reranked, broken"),
        ([{"retrieve": "bm25"}, {"rerank": "bm25"}], "stages.1.rerank: backend 'bm25' has no reranker"),
        ([{"retrieve": "bm25", "k": 6}], "stages.0.k = 6: must be from 1 to 5"),
        (
            [{"retrieve": "bm25", "k": 2}, {"rerank": "reranked", "k": 3}],
            "stages.1.k = 3: must be from 1 to 2",
        ),
        ([{"retrieve": "bm25", "depth": 2}], "stages.0.depth: Extra inputs are not permitted"),
    ],
)
def test_stages_that_cannot_be_are_answered_with_a_reason(server, stages, reason):
    answer = server.post("/v1/search", json={"queries": ["p"], "stages": stages})
    assert answer.status_code == 422 and reason in answer.json()["detail"]


def test_stages_and_a_backend_do_not_go_together(server):
    body = {"queries": ["p"], "stages": [{"retrieve": "bm25"}], "backend": "bm25"}
    answer = server.post("/v1/search", json=body)
    assert answer.status_code == 422 and "not beside stages" in answer.json()["detail"]
