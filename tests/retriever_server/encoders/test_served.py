"""An encoder whose work a server of OpenAI's embeddings does."""

import numpy as np
import pytest
from fastapi import FastAPI, HTTPException
from fastapi.responses import HTMLResponse, JSONResponse

import scripts.__main__ as sleuth
from data.corpus import Corpus
from data.errors import ConfigError, RetrieverError
from data.jsonl import write_jsonl
from retriever_server.encoders import served
from retriever_server.encoders.loading import load_encoder
from retriever_server.encoders.served import ServedEncoder
from retriever_server.indexes.base import open_index
from tests.retriever_server.running import serving
from tests.retriever_server.tiny_encoders import tiny_model

TEXTS = ["a river", "the north sea: a long text " * 40, "b"] * 60


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("served") / "dense", "dense")


def app_of(model, change=lambda vectors: vectors, failures=0):
    """A server with the model's vectors, which knows nothing of prompts, as vLLM does not."""
    app, bare, left = FastAPI(), load_encoder(model, passage_prompt="", query_prompt=""), [failures]

    @app.get("/v1/models")
    def models():
        return {"data": [{"id": "tiny"}]}

    @app.post("/v1/embeddings")
    def embeddings(body: dict):
        assert body["model"] == "tiny" and len(body["input"]) <= 64
        assert body["truncate_prompt_tokens"] == bare.spec.max_tokens
        if left[0]:
            left[0] -= 1
            raise HTTPException(503)
        rows = change(bare.encode(body["input"], "passage"))
        data = [{"index": i, "embedding": row.tolist()} for i, row in enumerate(rows)]
        return {"data": data[::-1]}

    return app


def test_a_server_encodes_as_the_model_here_does(model, monkeypatch):
    monkeypatch.setattr(served, "delay_seconds", lambda failures: 0.0)
    own = load_encoder(model)
    with serving(app_of(model, lambda rows: 3 * rows, failures=2)) as url:  # lengths are the spec's matter
        encoder = ServedEncoder(own, f"{url}/v1")
        assert encoder.spec == own.spec
        for role in ("passage", "query"):
            assert np.abs(encoder.encode(TEXTS, role) - own.encode(TEXTS, role)).max() < 1e-3
        assert encoder.encode([], "passage").shape == (0, 32)


def test_another_model_behind_the_server_is_refused(model):
    own = load_encoder(model)
    for change, says in (
        (lambda rows: np.roll(rows, 1, axis=1), r"vectors differ by [\d.]+ from .*, allowed is 0.001"),
        (lambda rows: rows[:, :8], "8 dimensions, not 32"),
    ):
        with serving(app_of(model, change)) as url, pytest.raises(ConfigError, match=says):
            ServedEncoder(own, f"{url}/v1")


def test_a_server_that_fails_and_a_wrong_place_are_said(model, monkeypatch):
    monkeypatch.setattr(served, "delay_seconds", lambda failures: 0.0)
    own = load_encoder(model)
    with serving(app_of(model, failures=99)) as url, pytest.raises(RetrieverError, match="answered 503"):
        ServedEncoder(own, f"{url}/v1")
    with pytest.raises(RetrieverError, match="404"), serving(FastAPI()) as url:
        ServedEncoder(own, f"{url}/v1")
    with pytest.raises(ConfigError, match="encode_with 'vllm': must be the URL of an embeddings server"):
        ServedEncoder(own, "vllm")


@pytest.mark.parametrize("given", ["<html>", {}, [], {"data": []}, {"data": [{}]}, {"data": None}])
def test_an_answer_of_another_form_is_refused_in_one_line(model, given):
    app = FastAPI()
    answer = HTMLResponse(given) if isinstance(given, str) else JSONResponse(given)
    app.get("/v1/models")(lambda: answer)
    with serving(app) as url, pytest.raises(ConfigError, match=r"/models answered .*, must be an embeddings"):
        ServedEncoder(load_encoder(model), f"{url}/v1")


def test_an_index_that_a_server_encoded_is_served_by_the_model_here(model, tmp_path, capsys):
    rows = [
        {"id": str(i), "contents": text} for i, text in enumerate(["a river", "the sea", "north", "a hill"])
    ]
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    argv = ["index", "--corpus", str(tmp_path / "corpus.jsonl"), "--encoder", model, "--device", "cpu"]
    with serving(app_of(model)) as url:
        assert sleuth.main([*argv, "--out", str(tmp_path / "far"), "--encode_with", f"{url}/v1"]) == 0
    assert sleuth.main([*argv, "--out", str(tmp_path / "near")]) == 0
    far, near = open_index(tmp_path / "far"), open_index(tmp_path / "near")
    assert far.generation == near.generation and len(Corpus(tmp_path / "corpus.jsonl")) == 4
    [ours], [theirs] = far.search(["a river"], 4), near.search(["a river"], 4)
    assert [hit.passage.id for hit in ours] == [hit.passage.id for hit in theirs]
    capsys.readouterr()
    wrong = [
        "index",
        "--corpus",
        str(tmp_path / "corpus.jsonl"),
        "--out",
        "x",
        "--encode_with",
        "http://a/v1",
    ]
    assert sleuth.main(wrong) == 2
    assert "encode_with" in capsys.readouterr().err
