"""Training on pages: resumed bit for bit, in batches of one kind of pair, with negatives of any kind."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from data.corpus import Corpus
from data.errors import ConfigError, DataError
from data.examples import Examples
from data.jsonl import read_jsonl, write_jsonl
from data.records import Hit, Item
from retriever_server.encoders.loading import load_encoder
from retriever_server.indexes.base import open_index
from retriever_server.retriever import Retriever
from retriever_server.training import run as training
from retriever_server.training.examples import as_dataset, split_by_pair
from retriever_server.training.mining import Rules, mine
from scripts.__main__ import main
from tests.retriever_server.training.pages import page, towers, vlm, write_pages
from tests.retriever_server.training.recipes import component, recipe

RECIPES = Path(__file__).parents[3] / "scripts/configs/retriever"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return write_pages(tmp_path_factory.mktemp("pages"))


def made(pages, out, model, **changes):
    loss = component(changes.pop("loss", "MultipleNegativesRankingLoss"))
    changes = {"no_duplicates": True, "passage_template": "{text}", "batch_size": 5, **changes}
    return recipe(pages, out, model=model, loss=loss, **changes)


class Killed(Exception):
    pass


def weights(folder):
    return load_file(folder / "checkpoints/step-000006/weights.safetensors")


@pytest.mark.slow
def test_resumed_with_workers_and_lora_equals_unbroken_bit_for_bit(pages, tmp_path):
    def kill(step, steps):
        if step == 5:
            raise Killed

    model = component("gme", base=vlm(pages))
    changes = {"inputs": "text+image", "lora": {"rank": 2}, "workers": 2}
    changes["loss"] = "CachedMultipleNegativesRankingLoss"
    whole = made(pages, tmp_path / "whole", model, **changes)
    broken = dataclasses.replace(whole, out=str(tmp_path / "broken"))
    folder = training.train(whole)
    with pytest.raises(Killed):
        training.train(broken, progress=kill)
    training.train(broken)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    encoder = load_encoder(str(folder), device="cpu")
    assert encoder.spec.inputs == "text+image" and encoder.spec.query_prompt.startswith("Find a page")
    assert encoder.encode([page(pages, 0), page(pages, 1, "text"), "text"], "passage").shape == (3, 32)


@pytest.mark.slow
@pytest.mark.parametrize("vectors", ["one", "many"])
def test_two_towers_learn_which_page_shows_what(vectors, pages, tmp_path):
    losses = []
    loss = "MultiVectorMultipleNegativesRankingLoss" if vectors == "many" else "MultipleNegativesRankingLoss"
    model = component("two_tower_pages", **towers(pages), vectors=vectors, dimension=32)
    settings = {"steps": 60, "save_every": 60, "batch_size": 20, "learning_rate": 5e-3, "loss": loss}
    training.train(
        made(pages, tmp_path / "run", model, **settings),
        lambda step, metrics: losses.append(metrics["train/loss"]) if "train/loss" in metrics else None,
    )
    assert losses[-1] < 0.5 * losses[0]
    encoder = load_encoder(str(tmp_path / "run/model"), device="cpu")
    assert encoder.spec.inputs == "image" and encoder.spec.image_processor.startswith("ViTImageProcessor")


def test_batches_hold_one_kind_of_pair_and_come_by_their_shares(pages, tmp_path):
    rows = [*read_jsonl(pages / "examples.jsonl")]
    for row in rows[:4]:
        row["query_image"] = f"pages/{row['positives'][0]}.png"
    write_jsonl(pages / "mixed.jsonl", rows)
    shares = {
        "text > image": 1,
        "text > text+image": 2,
        "text+image > image": 1,
        "text+image > text+image": 4,
    }
    train = {"examples": str(pages / "mixed.jsonl"), "corpus": str(pages / "corpus.jsonl"), "shares": shares}
    model = component("gme", base=vlm(pages))
    changes = {"inputs": "text+image", "batch_size": 2, "train": [train]}
    trainer, _ = training.build_trainer(made(pages, tmp_path, model, **changes), print, print)
    sampler = trainer.get_train_dataloader().batch_sampler
    names = [*trainer.train_dataset]
    for name, share in zip(names, sampler.shares, strict=True):
        assert share == pytest.approx(shares[name.removeprefix("set-1 ")] / 8)
        rows = trainer.train_dataset[name]
        assert {type(row["anchor"]) for row in rows} == {Item if " text+image >" in name else str}
    train["shares"] = {"text > image": 1}
    with pytest.raises(ConfigError, match=r"train\.shares: names text > image; the pairs are text"):
        training.build_trainer(made(pages, tmp_path, model, **changes), print, print)


def test_a_page_that_cannot_be_read_stops_training_by_name_from_a_worker_too(pages, tmp_path):
    broken = write_pages(tmp_path / "world")
    (broken / "pages/7.png").write_bytes((broken / "pages/7.png").read_bytes()[:40])
    model = component("two_tower_pages", **towers(pages))
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"^\S*pages/7\.png: [^\n]*$"):
            training.train(made(broken, tmp_path / f"run{workers}", model, batch_size=20, workers=workers))


def test_a_model_of_texts_refuses_pages_before_it_is_trained(pages, tmp_path):
    model = component("dense", base=towers(pages)["base"])
    with pytest.raises(ConfigError, match="inputs 'image': this model encodes text"):
        training.train(made(pages, tmp_path, model, inputs="image"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dse", "colpali", "gme"])
def test_a_recipe_trains_and_its_folder_is_indexed(name, pages, tmp_path):
    made = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    made["model"]["init_args"] |= {"base": vlm(pages), "dtype": "float32", "images": {"resample": 2}}
    train = made["train"][0]
    train |= {"examples": str(pages / "examples.jsonl"), "corpus": str(pages / "corpus.jsonl")}
    train["negatives"] = min(2, train.get("negatives", 0))
    made |= {"precision": "float32", "steps": 2, "batch_size": 4, "workers": 0, "device": "cpu"}
    made |= {"out": str(tmp_path / "run"), "dev": {"queries": str(pages / "dev.jsonl")}}
    made["dev"] |= {"qrels": str(pages / "qrels.tsv"), "limit": 4, "shared": "all"}
    (tmp_path / "recipe.json").write_text(json.dumps(made))
    assert main(["train-retriever", "--config", str(tmp_path / "recipe.json")]) == 0
    options = ["--corpus", str(pages / "corpus.jsonl"), "--encoder", str(tmp_path / "run/model")]
    assert main(["index", *options, "--out", str(tmp_path / "index")]) == 0
    index = open_index(tmp_path / "index")
    assert index.kind == ("maxsim" if name == "colpali" else "flat")
    hits = index.search(["red left", page(pages, 3)], 20)
    assert [len(each) for each in hits] == [20, 20]


class InOrder(Retriever):
    """Finds all pages in their order, and keeps what it was asked."""

    generation = "in order"

    def __init__(self, corpus):
        self.corpus, self.asked = corpus, []

    def search(self, queries, k, where=None):
        self.asked += queries
        hits = [Hit(passage, -float(i), self.generation) for i, passage in enumerate(self.corpus)]
        return [hits[:k] for _ in queries]


def test_negatives_are_mined_across_modalities(pages, tmp_path):
    rows = [*read_jsonl(pages / "examples.jsonl")][:3]
    rows[0] |= {"query": "", "query_image": "pages/0.png"}
    rows[1] |= {"query_image": "pages/1.png"}
    write_jsonl(pages / "asked.jsonl", rows)
    corpus = Corpus(pages / "corpus.jsonl")
    retriever, out = InOrder(corpus), tmp_path / "mined.jsonl"
    mine(Examples(pages / "asked.jsonl", corpus), retriever, corpus, out, Rules(per_query=4))
    assert [type(each) for each in retriever.asked] == [Item, Item, str]
    mined = Examples(out, corpus)  # in another folder
    assert mined[0].negatives == ("1", "2", "3", "4")  # pages without text are not taken for one another
    assert mined[0].query == "" and mined[0].asked == page(pages, 0)
    anchor = as_dataset(mined, negatives=1)[1]["anchor"]
    assert anchor == page(pages, 1, rows[1]["query"])
    data = as_dataset(mined, negatives=1)
    kinds = split_by_pair(data, mined, lambda passage: passage.text, {}, 2.0)
    assert set(kinds) == {"image > text", "text+image > text", "text > text"}
