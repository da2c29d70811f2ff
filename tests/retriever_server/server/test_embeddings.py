"""TEI, OpenAI and MCP clients get from the retriever what they get from the servers they were written for."""

import asyncio
import base64
import math

import numpy as np
import pytest
from fastapi.testclient import TestClient
from scipy.sparse import csr_array

from data.corpus import Corpus
from data.jsonl import write_jsonl
from data.records import Hit
from retriever_server.encoders.loading import load_encoder
from retriever_server.encoders.spec import Encoder, EncodingSpec, Multi
from retriever_server.retriever import Retriever, Scorer, Wrapper
from retriever_server.server.app import create_app
from tests.retriever_server.running import post
from tests.retriever_server.tiny_encoders import tiny_model

QUERY, PASSAGE = [3.0, 4.0, 0.0], [0.0, 5.0, 12.0]


class Fixed(Encoder):
    """One vector for every query, another for every passage."""

    def __init__(self, kind: str) -> None:
        self.spec = EncodingSpec("fixed", kind, "f", 3)

    def encode(self, texts, role):
        if "bad" in texts:
            raise ZeroDivisionError("bad")
        rows = np.array([QUERY if role == "query" else PASSAGE] * len(texts), np.float32)
        if self.spec.kind == "sparse":
            return csr_array(rows)
        return rows if self.spec.kind == "dense" else Multi(rows, np.arange(len(texts) + 1))


class LengthScorer(Scorer):
    name = "length"

    def score(self, pairs):
        return [float(len(passage.contents)) for _, passage in pairs]


class Whole(Retriever):
    """Finds the whole corpus; an encoder or a scorer inside, as in an index or a reranker."""

    generation = "w"

    def __init__(self, corpus=None, encoder=None, scorer=None) -> None:
        self.corpus, self.encoder, self.scorer = corpus, encoder, scorer

    def search(self, queries, k, where=None):
        return [[Hit(passage, 1.0, "w") for passage in self.corpus][:k] for _ in queries]


class Outer(Wrapper):
    """As a Rerank or Cached: what it has is inside."""

    def __init__(self, retriever: Retriever) -> None:
        super().__init__(retriever)
        self.retriever, self.generation = retriever, "outer"

    def search(self, queries, k, where=None):
        return self.retriever.search(queries, k)


DENSE, MULTI, SCORER = {"encoder": Fixed("dense")}, {"encoder": Fixed("multi")}, {"scorer": LengthScorer()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    url = {"url": "https://x.org/paris"}
    rows = [
        {"id": "7", "title": "Paris", "text": "A city.", "metadata": url},
        {"id": "8", "title": "Seine", "text": "A river."},
        {"id": "9", "title": "Paris", "text": "On the Seine.", "metadata": url},
    ]
    path = tmp_path_factory.mktemp("adapters") / "corpus.jsonl"
    write_jsonl(path, rows)
    return Corpus(path)


def ask(path, body, **parts):
    answer = post(Outer(Whole(**parts)), path, body)
    return answer.json() if answer.status_code == 200 else (answer.status_code, answer.json()["detail"])


def test_tei_embed():
    for body in ({"inputs": "a"}, {"inputs": ["a", "b"]}):
        rows = ask("/embed", body, encoder=Fixed("dense"))
        assert np.allclose(rows, [np.array(PASSAGE) / 13] * len(rows)) and len(rows) == len(body["inputs"])
    plain = {"inputs": "a", "normalize": False, "prompt_name": "query"}
    assert ask("/embed", plain, encoder=Fixed("dense")) == [QUERY]


def test_tei_embed_sparse_and_all():
    expected = [[{"index": 1, "value": 5.0}, {"index": 2, "value": 12.0}]]
    assert ask("/embed_sparse", {"inputs": "a"}, encoder=Fixed("sparse")) == expected
    assert ask("/embed_all", {"inputs": ["a"]}, encoder=Fixed("multi")) == [[PASSAGE]]


def test_openai_embeddings():
    body = {"input": ["a", "b"], "model": "m", "is_query": True}
    answer = ask("/v1/embeddings", body, encoder=Fixed("dense"))
    assert answer["object"] == "list" and answer["model"] == "m"
    assert [(item["index"], item["embedding"]) for item in answer["data"]] == [(0, QUERY), (1, QUERY)]
    coded = ask("/v1/embeddings", {"input": "a", "encoding_format": "base64"}, encoder=Fixed("dense"))
    decoded = np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4")
    assert decoded.tolist() == PASSAGE
    short = ask("/v1/embeddings", {"input": "a", "dimensions": 2}, encoder=Fixed("dense"))
    assert short["data"][0]["embedding"] == [0.0, 1.0]  # cut, and of length 1 again


def test_openai_errors_say_their_reason_where_its_client_looks():
    answer = post(Whole(), "/v1/embeddings", {"input": "a"})
    assert answer.json()["error"]["message"] == answer.json()["detail"] == "the retriever has no encoder"


@pytest.mark.parametrize("count", [3, 5000])
def test_many_texts_are_encoded_in_one_request(count):
    texts = [f"text {i}" for i in range(count)]
    answer = ask("/v1/embeddings", {"input": texts, "is_query": True}, encoder=Fixed("dense"))
    assert [item["index"] for item in answer["data"]] == list(range(count))
    assert all(item["embedding"] == QUERY for item in answer["data"])
    assert len(ask("/embed", {"inputs": texts}, encoder=Fixed("dense"))) == count


def test_token_ids_are_read_as_the_encoders_own(tmp_path):
    encoder = load_encoder(str(tiny_model(tmp_path / "d", "dense")), device="cpu")
    tokenizer = encoder._model.tokenizer
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in ("red fox", "sea")]
    expected = ask("/embed", {"inputs": ["red fox", "sea"]}, encoder=encoder)
    assert np.allclose(ask("/embed", {"inputs": ids}, encoder=encoder), expected)
    data = ask("/v1/embeddings", {"input": ids[0]}, encoder=encoder)["data"]
    assert len(data) == 1 and np.allclose(data[0]["embedding"], expected[0])
    status, reason = ask("/v1/embeddings", {"input": [9999]}, encoder=encoder)
    assert status == 400 and reason.startswith("token 9999: the encoder has those below")


def test_tei_root_does_what_the_model_is_for():
    rows = ask("/", {"inputs": "a", "normalize": False}, encoder=Fixed("dense"))
    assert rows == [PASSAGE]  # huggingface_hub's client asks so
    assert ask("/", {"inputs": "a"}, encoder=Fixed("sparse"))[0][0] == {"index": 1, "value": 5.0}
    ranked = ask("/", {"query": "q", "texts": ["a", "ccc"]}, scorer=LengthScorer())
    assert [item["index"] for item in ranked] == [1, 0]


def test_models_and_info_name_what_is_inside():
    with TestClient(create_app(Whole(encoder=Fixed("dense")))) as server:
        assert [model["id"] for model in server.get("/v1/models").json()["data"]] == ["fixed"]
        assert server.get("/v1/models/fixed").json() == server.get("/v1/models").json()["data"][0]
        answer = server.get("/v1/models/org/other")
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == "model 'org/other': there is fixed"
        described = server.get("/info").json()
        assert described["model_id"] == "fixed" and described["model_type"] == {"embedding": {"pooling": ""}}
    with TestClient(create_app(Whole(scorer=LengthScorer()))) as server:
        assert "reranker" in server.get("/info").json()["model_type"]
    with TestClient(create_app(Whole())) as server:
        assert server.get("/v1/models").json()["data"] == []
        assert server.get("/v1/models/fixed").json()["error"]["message"] == "model 'fixed': there is none"
        assert server.get("/info").status_code == 404


def test_cohere_jina_and_vllm_rerank():
    body = {"model": "rerank-v3.5", "query": "q", "documents": ["a", {"text": "ccc"}, "bb"], "top_n": 2}
    for path in ("/v1/rerank", "/v2/rerank"):
        answer = ask(path, body, scorer=LengthScorer())
        results = answer["results"]
        assert [item["index"] for item in results] == [1, 2] and answer["model"] == "rerank-v3.5"
        assert math.isclose(results[0]["relevance_score"], 1 / (1 + math.exp(-3)))
        assert results[0]["document"] == {"text": "ccc"}
        bare = ask(path, {**body, "return_documents": False}, scorer=LengthScorer())["results"]
        assert "document" not in bare[0]


@pytest.mark.parametrize(
    ("more", "order"),
    [
        ({"top_n": 2, "model": "jina-reranker-v1-base-en"}, [1, 2]),  # JinaRerank of llama-index 0.6
        ({"top_n": None, "model": "jina-reranker-v1-base-en"}, [1, 2, 0]),  # that of langchain-community 0.4
        ({"top_n": 0, "truncate_prompt_tokens": -1}, [1, 2, 0]),  # RerankRequest of vLLM 0.33, 0 for all
        ({"documents": "one alone"}, [0]),  # vLLM's, too
    ],
)
def test_rerank_reads_and_answers_as_clients_and_vllm_do(more, order):
    body = {"query": "q", "documents": ["a", "ccc", "bb"], **more}
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        answer = ask(path, body, scorer=LengthScorer())
        assert [item["index"] for item in answer["results"]] == order
        assert all(isinstance(item["document"]["text"], str) for item in answer["results"])
        assert isinstance(answer["id"], str) and isinstance(answer["model"], str)  # vLLM's RerankResponse
        assert answer["usage"].keys() == {"prompt_tokens", "total_tokens"}
        refused = ask(path, {**body, "top_n": -1}, scorer=LengthScorer())
        assert refused[0] == 422 and refused[1].startswith("top_n: ")


@pytest.mark.parametrize(
    ("path", "body", "parts", "trouble"),
    [
        ("/embed", {"inputs": "a"}, {}, (404, "the retriever has no encoder")),
        ("/embed", {"inputs": "a"}, {"encoder": Fixed("sparse")}, (404, "the encoder is sparse, not dense")),
        ("/embed", {"inputs": "bad"}, DENSE, (503, "encoding failed: ZeroDivision")),
        (
            "/embed_all",
            {"inputs": ["a"] * 4097},
            {"encoder": Fixed("multi")},
            (422, "4097 texts, at most 4096"),
        ),
        (
            "/embed",
            {"inputs": [[1, 2]]},
            DENSE,
            (422, "token ids: the encoder does not"),
        ),
        ("/embed", {"inputs": [True]}, DENSE, (422, "inputs")),
        ("/embed", {"inputs": []}, DENSE, (422, "at least 1 item")),
        ("/v1/embeddings", {"input": []}, DENSE, (400, "at least 1 item")),
        (
            "/v1/rerank",
            {"query": "q", "documents": [{}]},
            {"scorer": LengthScorer()},
            (422, "documents.0"),
        ),
        ("/", {"texts": ["a"]}, SCORER, (422, "query: must be a string")),
        ("/", {"inputs": "a"}, {}, (404, "the retriever has no encoder")),
        ("/rerank", {"query": "q", "texts": ["a"]}, {}, (404, "the retriever has no scorer")),
        ("/rerank", {"queries": ["q"], "documents": []}, SCORER, (422, "0 lists for 1")),
    ],
)
def test_what_is_not_there_or_fails_is_said(path, body, parts, trouble):
    status, reason = ask(path, body, **parts)
    assert status == trouble[0] and trouble[1] in reason


def test_tei_rerank():
    body = {"query": "q", "texts": ["a", "ccc", "bb"], "return_text": True}
    ranked = ask("/rerank", body, scorer=LengthScorer())
    assert [(item["index"], item["text"]) for item in ranked] == [(1, "ccc"), (2, "bb"), (0, "a")]
    assert math.isclose(ranked[0]["score"], 1 / (1 + math.exp(-3)))
    raw = ask("/rerank", {**body, "raw_scores": True}, scorer=LengthScorer())
    assert [item["score"] for item in raw] == [3.0, 2.0, 1.0]


def test_search_r1_rerank():
    documents = [[{"contents": "a"}, {"document": {"contents": "bb"}}], [{"contents": "c"}]]
    body = {"queries": ["p", "q"], "documents": documents, "rerank_topk": 1, "return_scores": True}
    assert ask("/rerank", body, scorer=LengthScorer()) == {
        "result": [
            [{"document": {"contents": "bb"}, "score": 2.0}],
            [{"document": {"contents": "c"}, "score": 1.0}],
        ]
    }


def test_access_returns_pages_of_the_corpus_only(corpus):
    asked = ["8", "https://x.org/paris", "https://elsewhere.org/", "/etc/passwd"]
    page = '"Paris"\nA city.\nOn the Seine.'
    expected = [{"contents": '"Seine"\nA river.'}, {"contents": page}, None, None]
    assert ask("/access", {"urls": asked}, corpus=corpus) == {"result": expected}
    assert ask("/access", {"urls": ["8"]})[0] == 422


def test_mcp_search_and_fetch(corpus):
    from mcp import Client

    from retriever_server.server.routes.mcp import make_mcp

    service = create_app(Whole(corpus)).state.service

    async def use():
        async with Client(make_mcp(service)) as client:
            names = {tool.name for tool in (await client.list_tools()).tools}
            found = await client.call_tool("search", {"query": "paris", "top_k": 1})
            page = await client.call_tool("fetch", {"id": found.structured_content["results"][0]["id"]})
            missing = await client.call_tool("fetch", {"id": "404"})
        await service.batcher.close()
        return names, found, page, missing

    names, found, page, missing = asyncio.run(use())
    assert names == {"search", "fetch"}
    assert found.structured_content["results"][0]["url"] == "https://x.org/paris"
    assert page.structured_content["text"] == "A city."
    assert missing.is_error and "no page '404'" in missing.content[0].text


def test_mcp_over_http_asks_for_a_loopback_name_or_a_token(corpus):
    initialize = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "initialize",
        "params": {
            "protocolVersion": "2025-06-18",
            "capabilities": {},
            "clientInfo": {"name": "t", "version": "1"},
        },
    }
    accept = {"Accept": "application/json, text/event-stream"}
    with TestClient(create_app(Whole(corpus), with_mcp=True), base_url="http://127.0.0.1:8000") as server:
        answer = server.post("/mcp", json=initialize, headers=accept)
        assert answer.json()["result"]["serverInfo"]["name"] == "sleuth"
        stranger = server.post("/mcp", json=initialize, headers={**accept, "Host": "evil.example"})
        assert stranger.status_code == 421
    with TestClient(create_app(Whole(corpus), with_mcp=True, token="t"), base_url="http://host") as server:
        assert server.post("/mcp", json=initialize, headers=accept).status_code == 401
        accept["Authorization"] = "Bearer t"
        assert server.post("/mcp", json=initialize, headers=accept).status_code == 200
