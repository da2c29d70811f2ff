"""The recipes of the decoder methods, from their files, with a tiny decoder in the place of their base."""

import json
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from data.records import Passage
from retriever_server.encoders.loading import load_encoder
from retriever_server.encoders.read_spec import describe_first
from retriever_server.retrievers.rerank import CrossEncoder
from scripts.__main__ import main
from tests.retriever_server.training.decoder_models import tiny_decoder

RECIPES = Path(__file__).parents[3] / "scripts/configs/retriever"


@pytest.fixture(scope="module")
def topics(topics):
    """With a tiny decoder in `base`."""
    tiny_decoder(topics / "base", "qwen3")
    return topics


def run(name, topics, out, **changes):
    import yaml

    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    for each in recipe["train"]:
        each["corpus"] = str(topics / "corpus.jsonl")
        if "examples" in each:
            each |= {"examples": str(topics / "examples.jsonl"), "negatives": min(each["negatives"], 2)}
    recipe["model"]["init_args"] |= {"base": str(topics / "base"), "dtype": "float32", **changes}
    recipe |= {"precision": "float32", "steps": 2, "batch_size": 4, "accumulate": 1, "device": "cpu"}
    recipe |= {"save_every": 2, "out": str(out), "lora": {**recipe["lora"], "rank": 4}}
    if recipe.get("matryoshka"):
        recipe["matryoshka"] = [16]
    (out.parent / f"{name}.json").write_text(json.dumps(recipe))
    assert main(["train-retriever", "--config", str(out.parent / f"{name}.json")]) == 0
    return str(out / "model")


@pytest.mark.slow
def test_every_recipe_trains_and_its_folder_serves(topics, tmp_path):
    eos = [run(name, topics, tmp_path / name) for name in ("e5_mistral", "repllama", "qwen3")]
    for folder in eos:
        encoder = load_encoder(folder, device="cpu")
        assert encoder.spec.pooling.startswith("eos > Pooling(lasttoken)") and encoder.spec.query_prompt
        assert describe_first(SentenceTransformer(folder, device="cpu")) == ["eos"]
    mntp = run("llm2vec_mntp", topics, tmp_path / "mntp")
    simcse = run("llm2vec_simcse", topics, tmp_path / "simcse", base=mntp)
    supervised = load_encoder(run("llm2vec", topics, tmp_path / "llm2vec", base=simcse), device="cpu")
    assert supervised.spec.pooling == "two-way > Pooling(mean, without prompt) > Normalize"
    assert describe_first(SentenceTransformer(supervised.spec.model, device="cpu")) == ["two-way"]
    reranker = CrossEncoder(run("lm_reranker", topics, tmp_path / "reranker"), device="cpu")
    assert len(reranker.score([("where?", Passage("1", "a river"))])) == 1
