"""Options of TEI's clients beside texts are heeded or refused; the description tells what is answered."""

import pytest
from fastapi.testclient import TestClient

from retriever_server.encoders.loading import load_encoder
from retriever_server.retrievers.rerank import CrossEncoder, YesNo
from retriever_server.server.app import create_app
from retriever_server.training.builders.promptreps import promptreps
from tests.fakes import byte_tokenizer
from tests.fakes import tiny_model as tiny_language_model
from tests.retriever_server.running import assert_as_described
from tests.retriever_server.server.test_embeddings import Fixed, LengthScorer, Whole, ask
from tests.retriever_server.tiny_encoders import tiny_model
from tests.retriever_server.training.decoder_models import tiny_decoder
from tests.samples import quick

ROUTES = {"dense": "/embed", "sparse": "/embed_sparse", "multi": "/embed_all"}


@pytest.mark.parametrize("name", ["document", "passage", "query", None, "absent"])
def test_a_prompt_goes_by_its_name_or_is_none(name):
    body = {"inputs": ["a"], "normalize": False, "prompt_name": "s2p_query"}
    status, reason = ask("/embed", body, encoder=Fixed("dense"))
    assert status == 422 and reason.startswith(
        "prompt_name: Input should be 'query', 'passage' or 'document'"
    )
    vectors = [[3.0, 4.0, 0.0]] if name == "query" else [[0.0, 5.0, 12.0]]
    asked = {**body, "prompt_name": name}
    if name == "absent":
        del asked["prompt_name"]
    assert ask("/embed", asked, encoder=Fixed("dense")) == vectors


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("/embed", {"inputs": "a", "truncate": "no"}, "truncate: Input should be a valid boolean"),
        ("/embed", {"inputs": "a", "truncate": False}, "the model does not say what it cuts"),
        ("/rerank", {"query": "q", "texts": ["a"], "truncate": False}, "the model does not say what it cuts"),
        ("/embed", {"inputs": "a", "truncation_direction": "Left"}, "truncation_direction: Input should be"),
        ("/embed", {"inputs": None}, "inputs: Input should be a valid string, not null"),
        ("/rerank", {"query": "q"}, "texts: must be a list of strings"),
        ("/embed", {"inputs": "a", "dimensions": 4}, "dimensions = 4: the vectors have 3"),
        ("/v1/embeddings", {"input": "a", "dimensions": 4}, "dimensions = 4: the vectors have 3"),
    ],
)
def test_what_is_not_done_is_refused(path, body, reason):
    status, detail = ask(path, body, encoder=Fixed("dense"), scorer=LengthScorer())
    assert status == (400 if path.startswith("/v1/") else 422) and reason in detail  # as OpenAI has it


@pytest.mark.parametrize("kind", quick(["dense"], ["dense", "sparse", "multi", "promptreps"]))
def test_a_text_that_would_be_cut_is_refused_with_truncate_false(kind, tmp_path):
    if kind == "promptreps":
        model, path = tmp_path / "model", "/embed"
        promptreps(tiny_decoder(tmp_path / "base", "qwen3"), max_tokens=400).save(str(model))
    else:
        model, path = tiny_model(tmp_path / kind, kind), ROUTES[kind]
    encoder, limit = load_encoder(str(model), device="cpu"), 400 if kind == "promptreps" else 64
    counted = {role: encoder.tokens_of("fox", role) for role in ("query", "passage")}
    with TestClient(create_app(Whole(encoder=encoder))) as server:
        for role, (tokens, kept) in counted.items():
            assert tokens == kept < limit
            text, asked = "fox", {"truncate": False, "prompt_name": role}
            while encoder.tokens_of(f"{text} fox", role)[0] <= limit:
                text = f"{text} fox"
                assert len(text) < 2000
            for times in (1, 20, 20_000):
                long = text + " fox" * times
                answer = server.post(path, json={**asked, "inputs": ["fox", long]})
                assert answer.status_code == 413, answer.text
                assert "tokens or more, at most" in answer.json()["detail"]
                whole = {"prompt_name": role, "inputs": ["fox", long]}
                assert server.post(path, json=whole).status_code == 200  # as it was
                assert server.post(path, json={**whole, "truncate": True}).status_code == 200
            answer = server.post(path, json={**asked, "inputs": ["fox", text]})
            assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("kind", ["cross", "yes-no"])
def test_so_is_a_pair_that_a_reranker_would_cut(kind, tmp_path):
    if kind == "cross":
        scorer = CrossEncoder(tiny_model(tmp_path / "c", "cross"), max_length=64, device="cpu")
    else:
        tokenizer = byte_tokenizer()
        tokenizer.save_pretrained(tmp_path)
        tiny_language_model("qwen2", len(tokenizer)).save_pretrained(tmp_path)
        scorer = YesNo(str(tmp_path), max_length=200)
    with TestClient(create_app(Whole(scorer=scorer))) as server:
        for times, status in ((1, 200), (100, 413), (20_000, 413)):
            texts = ["fox", "fox " * times]
            answer = server.post("/rerank", json={"query": "fox", "texts": texts, "truncate": False})
            assert answer.status_code == status, answer.text
            assert server.post("/rerank", json={"query": "fox", "texts": texts}).status_code == 200
            documents = {"queries": ["fox"], "documents": [[{"contents": texts[1]}]]}
            assert server.post("/rerank", json={**documents, "truncate": False}).status_code == status


def test_every_route_describes_what_it_may_answer():
    with TestClient(create_app(Whole(encoder=Fixed("dense")))) as server:
        paths = server.get("/openapi.json").json()["paths"]
    peers = {"/retrieve", "/search", "/batch_search", "/access"}
    encoding = {"/", "/embed", "/embed_sparse", "/embed_all", "/rerank", "/v1/embeddings", "/v1/rerank"}
    for path in peers | encoding | {"/v1/search"}:
        described = set(paths[path]["post"]["responses"])
        assert {"200", "400", "401", "413", "421", "422", "500", "501", "503", "504"} <= described, path
        assert ("429" in described) == path.startswith("/v1/"), path
        assert ("404" in described) == (path in encoding), path
    answers = {
        name: each["responses"]["200"]["content"] for name, of in paths.items() for each in of.values()
    }
    assert not [
        name for name, each in answers.items() if each.get("application/json", {}).get("schema") == {}
    ]
    assert list(answers["/metrics"]) == ["text/plain"]


@pytest.mark.parametrize(
    "path", ["/healthz", "/readyz", "/v1/info", "/info", "/v1/models", "/v1/models/fixed"]
)
def test_probes_and_models_answer_as_described(path):
    app = create_app(Whole(encoder=Fixed("dense")))
    with TestClient(app) as server:
        assert_as_described(app, answer := server.get(path))
    assert answer.status_code == 200
