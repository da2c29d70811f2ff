"""The recipes of learned sparse models, ColBERT and BGE-M3, from their files, on a tiny base."""

import json
from pathlib import Path

import pytest
import yaml

from data.corpus import Corpus
from retriever_server.indexes.base import open_index
from scripts.__main__ import main

RECIPES = Path(__file__).parents[3] / "scripts/configs/retriever"
NAMES = ("splade", "unicoil", "deepimpact", "colbert", "colbert_minilm", "bge_m3")
KINDS = {"splade": "inverted", "unicoil": "inverted", "deepimpact": "inverted"} | dict.fromkeys(
    ("colbert", "colbert_minilm"), "maxsim"
)


def trained(name, topics, out, **changes):
    """The folder of the model that a recipe makes in two steps."""
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    for each in recipe["train"]:
        each |= {"corpus": str(topics / "corpus.jsonl"), "examples": str(topics / "examples.jsonl")}
        each["negatives"] = min(each["negatives"], 2)
    config = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1}
    base = {"config": config, "corpus": str(topics / "corpus.jsonl"), "folder": str(topics / "base")}
    recipe["model"]["init_args"]["base"] = base
    recipe["model"]["init_args"] |= changes.pop("model", {})
    recipe["loss"]["init_args"] |= changes.pop("loss", {})
    recipe |= {
        "precision": "float32",
        "steps": 2,
        "epochs": 1,
        "batch_size": 4,
        "device": "cpu",
        "out": str(out),
    }
    out.with_suffix(".yaml").write_text(json.dumps(recipe))
    assert main(["train-retriever", "--config", str(out.with_suffix(".yaml"))]) == 0
    return out / "model"


def indexed(topics, model, out, *options):
    """The kind of the index that is made of the model by the command; its passages are found by words."""
    files = ["--corpus", str(topics / "corpus.jsonl"), "--out", str(out), "--encoder", str(model)]
    assert main(["index", *files, "--device", "cpu", *options]) == 0
    index = open_index(out)
    assert len(index.search(["river"], 3)[0]) >= 1
    return index.kind


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name in KINDS])
def test_a_recipe_trains_and_its_folder_is_indexed(name, topics, tmp_path):
    model = trained(name, topics, tmp_path / name)
    options = ["--dtype", "int8", *(["--terms_per_passage", "4"] if name == "splade" else [])]
    assert indexed(topics, model, tmp_path / "index", *options) == KINDS[name]
    if name in ("unicoil", "deepimpact"):
        spec = open_index(tmp_path / "index").encoder.spec
        passage = Corpus(topics / "corpus.jsonl")[0]
        assert spec.render(passage) == "river\nthe river is here where river?"


@pytest.mark.slow
def test_splade_without_a_query_encoder_trains(topics, tmp_path):
    loss = {"query_weight": None, "objective": "kl", "contrastive_weight": 1.0, "mini_batch_size": 2}
    model = trained("splade", topics, tmp_path / "free", model={"inference_free": True}, loss=loss)
    assert indexed(topics, model, tmp_path / "index") == "inverted"


@pytest.mark.slow
def test_m3_trains_and_is_three_indexes(topics, tmp_path):
    model = trained("bge_m3", topics, tmp_path / "m3", model={"dimension": 16})
    assert indexed(topics, model, tmp_path / "trunk") == "flat"
    kinds = [indexed(topics, model / kind, tmp_path / kind) for kind in ("dense", "sparse", "multi")]
    assert kinds == ["flat", "inverted", "maxsim"]
