"""The server's own faults: 5xx without a path, never NaN; and one bad query fails alone."""

import asyncio
import json
import logging

import numpy as np
import pytest
from fastapi.testclient import TestClient

from data.errors import ConfigError, CorpusChanged, DataError, RetrieverUnavailable, StorageError
from data.records import Hit, Passage
from retriever_server.retriever import Retriever
from retriever_server.server.app import create_app
from retriever_server.server.config import Limits
from retriever_server.server.errors import without_paths
from retriever_server.server.service import Caller
from tests.retriever_server.running import post
from tests.retriever_server.server.test_embeddings import Fixed

PLACE = "/srv/private/corpus.jsonl"
ERRORS = [
    DataError(f"{PLACE}:3: not JSON"),
    DataError("runs/private/corpus.jsonl:3: not JSON"),
    ConfigError(f"{PLACE}: no index"),
    StorageError(f"{PLACE}: disk full"),
    CorpusChanged(f"{PLACE}: rewritten"),
    FileNotFoundError(2, "No such file or directory", PLACE),
    OSError(f"cannot map {PLACE}"),
    RuntimeError(f"in '{PLACE}', line 7"),
    RetrieverUnavailable(f"part 2 of 2 ({PLACE}): gone"),
    KeyError(PLACE),
]


class Faulty(Retriever):
    """Finds a passage a query; a query that names a fault has it."""

    generation = "faulty"

    def __init__(self, **faults) -> None:
        self.faults = faults

    def search(self, queries, k, where=None):
        [query.encode() for query in queries]  # as a tokenizer would
        return [self.one(query, k) for query in queries]

    def one(self, query, k):
        fault = self.faults.get(query)
        if isinstance(fault, Exception):
            raise fault
        return fault or [Hit(Passage("1", query), 1.0, "faulty")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{type(error).__name__} {str(error)[:12]}")
def test_an_error_of_the_servers_own_is_5xx_and_names_no_path(error, caplog):
    retriever = Faulty(bad=error)
    caplog.set_level(logging.INFO)
    answer = post(retriever, "/retrieve", {"queries": ["bad"]})
    own = post(retriever, "/v1/search", {"queries": ["a", "bad"]})
    assert answer.status_code == 503 and own.status_code == 200
    for text in (answer.json()["detail"], own.json()["results"][1]["error"]):
        assert text.startswith("search failed: ") and "private" not in text and "corpus.jsonl" not in text
    assert "private" in caplog.text  # but the log says it


@pytest.mark.parametrize("error", ERRORS[:5], ids=lambda error: type(error).__name__)
def test_so_is_one_of_the_pages_of_a_corpus(error):
    class Corpus:
        def get(self, passage_id):
            raise error

    retriever = Faulty()
    retriever.corpus = Corpus()
    answer = post(retriever, "/access", {"urls": ["1"]})
    assert answer.status_code >= 500 and "private" not in answer.text and answer.json()["detail"]


def test_without_paths_leaves_what_is_no_path():
    assert (
        without_paths("at http://127.0.0.1:8000/retrieve: 7 of 8")
        == "at http://127.0.0.1:8000/retrieve: 7 of 8"
    )
    assert without_paths("'/a/b.npy', a/b and ~/x.json#page=3: gone") == "'...', ... and ...: gone"


NAN, INF = float("nan"), float("inf")
UNSOUND = {
    "NaN": [Hit(Passage("1", "x"), NAN, "g")],
    "infinite": [Hit(Passage("1", "x"), 1.0, "g"), Hit(Passage("2", "x"), -INF, "g")],
    "no id": [Hit(Passage("", "x"), 1.0, "g")],
    "too many": [Hit(Passage(str(i), "x"), 1.0, "g") for i in range(4)],
}


@pytest.mark.parametrize("fault", UNSOUND)
def test_hits_that_are_none_are_an_error_of_their_query_alone(fault):
    retriever = Faulty(**{fault: UNSOUND[fault]})
    first, bad, last = post(retriever, "/v1/search", {"queries": ["a", fault, "b"]}).json()["results"]
    assert bad["hits"] == [] and "search failed: RetrieverError: " in bad["error"]
    assert [result["hits"][0]["text"] for result in (first, last)] == ["a", "b"]
    assert post(retriever, "/retrieve", {"queries": [fault], "return_scores": True}).status_code == 503


@pytest.mark.parametrize("value", [NAN, INF, np.float32(1), {1, 2}])
def test_what_json_cannot_carry_is_an_error_and_never_sent(value):
    retriever = Faulty(bad=[Hit(Passage("1", "x", metadata={"deep": [value]}), 1.0, "g")])
    for path in ("/retrieve", "/v1/search"):
        answer = post(retriever, path, {"queries": ["bad"]})
        assert answer.status_code == 503 and "cannot be sent as JSON" in answer.json()["detail"]


@pytest.mark.parametrize("kind", ["dense", "sparse", "multi"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_vectors_with_nan_are_an_error_and_never_sent(kind, value):
    class Broken(Fixed):
        def encode(self, texts, role):
            vectors = super().encode(texts, role)
            (vectors.values if kind == "multi" else vectors.data if kind == "sparse" else vectors).flat[0] = (
                value
            )
            return vectors

    retriever = Faulty()
    retriever.encoder = Broken(kind)
    paths = {"dense": ["/embed", "/v1/embeddings"], "sparse": ["/embed_sparse"], "multi": ["/embed_all"]}
    for path in paths[kind]:
        body = {"inputs": ["a"], "input": ["a"], "normalize": False, "encoding_format": "base64"}
        answer = post(retriever, path, body)
        assert answer.status_code == 503 and "NaN or infinite" in answer.json()["detail"]


@pytest.mark.parametrize("raw", [True, False])
def test_scores_with_nan_are_an_error_and_never_sent(raw):
    class Scorer:
        def score(self, pairs):
            return [NAN for _ in pairs]

    retriever = Faulty()
    retriever.scorer = Scorer()
    answer = post(retriever, "/rerank", {"query": "a", "texts": ["x", "y"], "raw_scores": raw})
    assert answer.status_code == 503 and "NaN or infinite" in answer.json()["detail"]


def test_a_query_that_is_no_unicode_fails_alone():
    with TestClient(create_app(Faulty())) as server:
        body = json.dumps({"queries": ["a", "\ud800", {"text": "\udfff"}, "b"]}).encode()
        first, bad, too, last = server.post("/v1/search", content=body).json()["results"]
        assert [result["hits"][0]["text"] for result in (first, last)] == ["a", "b"]
        assert bad == too == {"hits": [], "error": "not Unicode: half a surrogate pair"}
        refused = server.post("/retrieve", content=body.replace(b', {"text": "\\udfff"}', b""))
        assert refused.status_code == 422 and "half a surrogate pair" in refused.json()["detail"]


def test_a_filter_of_no_use_here_is_the_callers_fault():
    class Unfiltered(Faulty):
        def search(self, queries, k, where=None):
            if where is not None:
                raise ConfigError("web search: filter must be none")
            return super().search(queries, k)

    for path in ("/retrieve", "/v1/search"):
        answer = post(Unfiltered(), path, {"queries": ["a"], "where": {"year": 1}})
        assert answer.status_code == 422 and "filter must be none" in answer.json()["detail"]


def test_what_nobody_expected_is_json_without_a_word_of_it():
    class Broken(Faulty):
        def takes_images(self):
            raise ZeroDivisionError(PLACE)

    app = create_app(Faulty())
    with TestClient(app, raise_server_exceptions=False) as server:
        app.state.service.backends["default"].current.retriever = Broken()
        answer = server.get("/v1/info")
    assert answer.status_code == 500 and answer.json() == {
        "detail": "an error of the server; its log says more"
    }


def test_a_client_that_leaves_as_its_answer_is_ready_is_no_error():
    async def work(moment):
        await asyncio.sleep(0)  # so that the client is the first to be told
        return await moment.wait()

    async def run():
        complaints, moment = [], asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        request = type("Request", (), {"receive": lambda self: moment.wait()})()
        service = type("Service", (), {"limits": Limits()})()
        loop.call_later(0.01, moment.set)
        assert await Caller(service, request).wait(work(moment))
        await asyncio.sleep(0.01)
        return complaints

    assert asyncio.run(run()) == []
