"""Errors as the packages of others read them: each shows its user the reason and raises its own exception."""

import pytest
from fastapi.testclient import TestClient

from retriever_server.server.app import create_app
from tests.retriever_server.server.test_app import LIMITS, Stub

TAVILY = {"X-Client-Source": "tavily-python"}


@pytest.fixture(scope="module")
def server():
    with TestClient(create_app(Stub(), LIMITS)) as client:
        yield client


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/retrieve", {"queries": ["a"], "topk": 0}, "topk"),
        ("/retrieve", {"query": "a", "top_k": 0}, "top_k"),
        ("/retrieve", {"query": "a", "k": 0}, "k"),
        ("/search", {"query": "a", "max_results": 0}, "max_results"),
        ("/search", {"query": "a", "numResults": 0}, "numResults"),
        ("/search", {"query": "a", "top_n": 0}, "top_n"),
        ("/search", {"q": "a", "num": 0}, "num"),
        ("/batch_search", {"query": ["a"], "top_n": 0}, "top_n"),
        ("/v1/search", {"queries": ["a"], "top_k": 0}, "top_k"),
    ],
)
def test_a_wrong_number_of_passages_goes_by_the_name_that_the_client_gave_it(server, path, body, name):
    assert server.post(path, json=body).json()["detail"] == f"{name} = 0: must be from 1 to 5"


@pytest.mark.parametrize(
    ("path", "body", "place"),
    [
        ("/v1/embeddings", {"input": "a"}, lambda said: said["error"]["message"]),
        ("/v1/responses", {"input": "a"}, lambda said: said["error"]["message"]),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}, lambda said: said["message"]),
        ("/v2/rerank", {"query": "a", "documents": ["b"]}, lambda said: said["message"]),
        ("/rerank", {"query": "a", "texts": ["b"]}, lambda said: said["error"]),
        ("/embed", {"inputs": "a"}, lambda said: said["error"]),
        ("/", {"inputs": "a"}, lambda said: said["error"]),
    ],
)
def test_the_reason_stands_where_the_clients_of_a_route_look(server, path, body, place):
    answer = server.post(path, json=body)
    assert answer.status_code == 404 and place(answer.json()) == answer.json()["detail"]


@pytest.mark.parametrize("path", ["/v1/responses", "/nothing"])
def test_a_route_that_is_not_there_is_named(server, path):
    said = server.post(path, json={}).json()["detail"]
    assert said == f"POST {path}: not found; /openapi.json lists the routes"


def test_tavily_reads_its_errors(server):
    wrong = [{"query": "a", "max_results": 0}, {"query": "a", "max_results": "3"}]
    answers = [server.post("/search", json=body, headers=TAVILY) for body in wrong]
    assert [answer.status_code for answer in answers] == [400, 400]
    reasons = [answer.json()["detail"]["error"] for answer in answers]
    assert reasons[0] == "max_results = 0: must be from 1 to 5" and reasons[1].startswith("max_results: ")


def test_tavily_reads_that_its_key_is_wrong():
    with TestClient(create_app(Stub(), LIMITS, token="right")) as guarded:
        answer = guarded.post("/search", json={"query": "a"}, headers=TAVILY)
    assert answer.status_code == 401 and "token" in answer.json()["detail"]["error"]
