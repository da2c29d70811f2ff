"""Golden contracts: what each project's client sends, byte for byte, and what it reads from the answer."""

import sys
import time

import pytest
from fastapi.testclient import TestClient

from data.records import Hit, Passage
from retriever_server.retriever import Retriever
from retriever_server.server.app import create_app
from retriever_server.server.backends import HotSwappable
from tests.retriever_server.running import post

PASSAGES = [
    Passage("7", "A city.\nOn a river.", "Paris", {"url": "https://x.org/paris"}),
    Passage("8", "A river.", "Seine"),
]
CONTENTS = ['"Paris"\nA city.\nOn a river.', '"Seine"\nA river.']


class TwoPassages(Retriever):
    generation = "g1"
    corpus = None

    def search(self, queries, k, where=None):
        return [[Hit(p, 0.5 - i / 4, "g1") for i, p in enumerate(PASSAGES[:k])] for _ in queries]


def ask(path: str, body, dialect: str = "rllm"):
    answer = post(TwoPassages(), path, body, dialect=dialect)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_search_r1_and_verl():
    answer = ask("/retrieve", {"queries": ["a", "b"], "topk": 2, "return_scores": True})
    assert [[hit["document"]["contents"] for hit in row] for row in answer["result"]] == [CONTENTS] * 2
    assert [hit["score"] for hit in answer["result"][0]] == [0.5, 0.25]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_slime_asks_without_scores_which_the_original_server_mistakes(number):
    answer = ask("/retrieve", {"queries": ["a"] * number, "topk": 1, "return_scores": False})
    assert [[document["contents"] for document in row] for row in answer["result"]] == [CONTENTS[:1]] * number


def test_search_r1_with_reranking_asks_for_what_is_left_after_it():
    body = {"queries": ["a"], "topk_retrieval": 10, "topk_rerank": 1, "return_scores": True}
    assert len(ask("/retrieve", body)["result"][0]) == 1


def test_skyrl_asks_one_query():
    answer = ask("/retrieve", {"query": "a", "topk": 2, "return_scores": True})
    assert [hit["document"]["contents"] for hit in answer["result"][0]] == CONTENTS


def test_rllm_reads_results():
    for body in ({"query": "a", "top_k": 2}, {"query": "a", "top_k": 2, "k": 2}):
        answer = ask("/retrieve", body)
        assert (answer["query"], answer["num_results"]) == ("a", 2) and answer["method"]
        assert [hit["content"] for hit in answer["results"]] == CONTENTS
        first = answer["results"][0]  # its tool reads id and contents of `document`
        assert (first["document"]["id"], first["document"]["contents"]) == ("7", CONTENTS[0])
        assert f"{first['score']:.3f}" == "0.500"


def test_rllm_probes_health():
    with TestClient(create_app(TwoPassages())) as server:
        assert server.get("/health").status_code == 200


def test_zerosearch_reads_a_bare_list_where_the_dialect_says_so():
    assert ask("/retrieve", {"query": "a", "top_k": 2}, "zerosearch") == [{"text": text} for text in CONTENTS]
    both = ask("/retrieve", {"query": "a", "top_k": 2, "k": 2}, "zerosearch")
    assert both["num_results"] == 2  # nobody but rllm sends both


def test_the_dialect_search_r1_answers_one_query_in_rows():
    assert len(ask("/retrieve", {"query": "a", "top_k": 2}, "search-r1")["result"][0]) == 2


def test_asearcher_reads_a_url_of_every_document():
    answer = ask("/retrieve", {"queries": ["a"], "topk": 2, "return_scores": False}, "asearcher")
    assert [document["contents"] for document in answer["result"][0]] == CONTENTS
    assert [document["url"] for document in answer["result"][0]] == ["https://x.org/paris", "8"]


def test_recall_reads_lists():
    documents = [{"id": "7", "contents": CONTENTS[0]}, {"id": "8", "contents": CONTENTS[1]}]
    assert ask("/search", {"query": "a", "top_n": 2}) == documents
    scored = {"query": "a", "top_n": 2, "return_score": True}
    assert ask("/search", scored) == [documents, [0.5, 0.25]]
    assert ask("/batch_search", {"query": ["a", "b"], "top_n": 2}) == [documents] * 2
    scored["query"] = ["a", "b"]
    assert ask("/batch_search", scored) == [[documents] * 2, [[0.5, 0.25]] * 2]


def test_serper_clients_read_organic_results():
    answer = ask("/search", {"q": "a", "num": 1})
    assert answer["organic"] == [
        {"title": "Paris", "link": "https://x.org/paris", "snippet": PASSAGES[0].text, "position": 1}
    ]


def test_browsecomp_plus_and_lrat_read_a_flat_list_with_docids():
    hits = ask("/retrieve", {"query": "a"})["result"]
    assert [hit["docid"] for hit in hits] == ["7", "8"]
    assert [(hit["document"]["title"], hit["document"]["text"]) for hit in hits] == [
        ("Paris", "A city.\nOn a river."),
        ("Seine", "A river."),
    ]


def test_gem_asks_and_reads_in_messagepack():
    msgpack = pytest.importorskip("msgpack")
    payload = msgpack.packb({"query": "a", "topk": 2, "return_scores": True})
    with TestClient(create_app(TwoPassages())) as server:
        answer = server.post("/retrieve", content=payload)  # no type, as requests sends bytes
        assert answer.headers["content-type"] == "application/msgpack"
        hits = msgpack.unpackb(answer.content)["result"]
        assert [hit["document"]["contents"] for hit in hits] == CONTENTS
        several = server.post("/retrieve", content=msgpack.packb({"queries": ["a"], "topk": 1}))
        assert len(msgpack.unpackb(several.content)["result"][0]) == 1
        assert server.post("/retrieve", content=payload[:9]).status_code == 400
        assert server.post("/retrieve", content=payload + b"x").status_code == 400
        assert server.post("/retrieve", content=msgpack.packb({"query": 1})).status_code == 422
        for other, kind in ((["a", 1], "list"), ("a", "str"), (b"a", "bytes"), (None, "NoneType")):
            refused = server.post("/retrieve", content=msgpack.packb(other))
            assert refused.status_code == 422
            assert refused.json()["detail"] == f"body: MessagePack of {kind}, must be a map"


def test_messagepack_without_its_package_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with TestClient(create_app(TwoPassages())) as server:
        answer = server.post("/retrieve", content=b"\x81\xa5query\xa1a")
    assert answer.status_code == 501 and "pip install 'sleuth-rl[msgpack]'" in answer.json()["detail"]


TAVILY = {"query": "a", "search_depth": "basic", "include_answer": False, "max_results": 1}


@pytest.mark.parametrize(("body", "number"), [({"query": "a"}, 2), (TAVILY, 1)])
def test_tavily_reads_content(body, number):
    answer = ask("/search", body)
    assert answer["query"] == "a" and len(answer["results"]) == number
    first = {"url": "https://x.org/paris", "title": "Paris", "score": 0.5, "content": PASSAGES[0].text}
    assert answer["results"][0] == {"id": "7", **first}


@pytest.mark.parametrize("contents", [{"text": {"maxCharacters": 10000}}, {"text": True}])
def test_exa_reads_text(contents):
    answer = ask("/search", {"query": "a", "numResults": 1, "contents": contents})
    first = {"url": "https://x.org/paris", "title": "Paris", "score": 0.5, "text": PASSAGES[0].text}
    assert answer["results"] == [{"id": "7", **first}]


@pytest.mark.parametrize("path", ["/retrieve", "/search", "/batch_search", "/access"])
def test_what_no_dialect_asks_is_refused(path):
    with TestClient(create_app(TwoPassages())) as server:
        assert server.post(path, json={"question": "a"}).status_code == 422


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (["a"], "body: must be a JSON object"),
        ({"queries": "a"}, "queries: Input should be a valid list"),
        ({"queries": [1]}, "queries.0: Input should be a valid string"),
        ({"queries": [], "topk": "3"}, "topk: Input should be a valid integer"),
        ({"queries": [], "topk": True}, "topk"),
        ({"queries": [], "topk": 1.5}, "topk"),
        ({"queries": [], "return_scores": 1}, "return_scores: Input should be a valid boolean"),
    ],
)
def test_wrong_requests_name_the_field(body, message):
    with TestClient(create_app(TwoPassages())) as server:
        answer = server.post("/retrieve", json=body)
        null = server.post("/retrieve", content=b"null")
    assert answer.status_code == 422 and answer.json()["detail"].startswith(message)
    assert null.status_code == 422 and null.json() == {"detail": "body: must be a JSON object, not null"}


class Named(Retriever):
    """Finds one passage with a picture, whose metadata is the filter; `wait` is not found in time."""

    def __init__(self, generation: str) -> None:
        self.generation = generation

    def search(self, queries, k, where=None):
        if "wait" in queries:
            time.sleep(0.5)
        passage = Passage("7", self.generation, metadata=dict(where or {}), image="7.png")
        return [[Hit(passage, 1.0, self.generation)] for _ in queries]


ROUTES = [
    ("/retrieve", {"queries": ["a"]}),
    ("/retrieve", {"query": "a", "topk": 1}),
    ("/retrieve", {"query": "a", "top_k": 1}),
    ("/retrieve", {"query": "a"}),
    ("/search", {"query": "a", "top_n": 1}),
    ("/search", {"query": "a", "contents": {"text": True}}),
    ("/search", {"q": "a", "num": 1}),
    ("/batch_search", {"query": ["a"]}),
]


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_every_dialect_may_name_a_backend_a_filter_and_a_deadline(path, body):
    backends = {name: HotSwappable(Named(name)) for name in ("one", "two")}
    with TestClient(create_app(backends)) as server:
        assert "one" in server.post(path, json=body).text
        answer = server.post(path, json={**body, "backend": "two"}).text
        assert "two" in answer and "one" not in answer
        if path == "/retrieve":
            assert "/v1/thumbnail/7?backend=two" in answer
            assert "backend=" not in server.post(path, json={**body, "backend": "one"}).text
            assert '"year": 1999' in server.post(path, json={**body, "where": {"year": 1999}}).text
        late = {
            name: ["wait"] if isinstance(body.get(name), list) else "wait"
            for name in ("queries", "query", "q")
        }
        asked = {**body, **{name: late[name] for name in late if name in body}, "deadline_seconds": 0.05}
        assert server.post(path, json=asked).status_code == 504
        for wrong, reason in (
            ({"backend": "three"}, "backend 'three': must be one of one, two"),
            ({"where": {"year": {"near": 1}}}, "filter on 'year'"),
            ({"where": "year"}, "where: must be a JSON object"),
            ({"deadline_seconds": -1}, "deadline_seconds: Input should be greater than 0"),
        ):
            answer = server.post(path, json={**body, **wrong})
            assert answer.status_code == 422 and reason in answer.json()["detail"]
