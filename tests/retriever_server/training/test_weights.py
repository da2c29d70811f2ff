"""Weights of examples and of their negatives, from the file to the column that the loss reads."""

import pytest

from data.corpus import Corpus
from data.errors import ConfigError
from data.examples import Examples
from data.jsonl import write_jsonl
from retriever_server.training import run as training
from retriever_server.training.examples import as_dataset
from retriever_server.training.recipe import DataConfig
from tests.retriever_server.training.recipes import component, recipe, settings
from tests.samples import quick


def test_weights_are_those_of_the_chosen_negatives_and_1_where_none_is_said(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", [{"id": f"p{i}", "text": f"text {i}"} for i in range(12)])
    provenance = {"weight": 0.5, "negative_weights": {"p1": 3.0, "p2": 0.3}}
    rows = [
        {"query": "a", "positives": ["p0"], "negatives": ["p1", "p2"], "provenance": provenance},
        {"query": "b", "positives": ["p5"]},
    ]
    write_jsonl(tmp_path / "examples.jsonl", rows)
    examples = Examples(tmp_path / "examples.jsonl", Corpus(tmp_path / "corpus.jsonl"))
    labels = list(as_dataset(examples, negatives=3, weights=True)["label"])
    assert labels == [[0.5, 3.0, 0.3, 1.0], [1.0] * 4]
    drawn = list(as_dataset(examples, negatives=1, weights=True, draws=2)["label"])
    assert drawn[0] == [0.5, 3.0] and drawn[2] == [0.5, 0.3]
    with pytest.raises(ConfigError, match=r"train\.weights = True: must be false, unless form is tuple"):
        DataConfig("c", "e", weights=True, labels=True)


@pytest.mark.parametrize("steps", quick([2], [2, 12]))
def test_a_retriever_trains_on_weights_and_says_where_they_are_missing(rivers, tmp_path, steps):
    loss = component("WeightedInfoNCE", mini_batch_size=8)
    train = [{**settings(rivers, "")["train"][0], "negatives": 2, "weights": True}]
    rows = []
    long = {"loss": loss, "train": train, "steps": steps, "save_every": steps}
    training.train(recipe(rivers, tmp_path / "a", **long), lambda step, row: rows.append(row))
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == steps and (steps == 2 or sum(losses[-4:]) < sum(losses[:4]))
    train[0]["weights"] = False
    with pytest.raises(ConfigError, match="say weights: true"):
        training.train(recipe(rivers, tmp_path / "b", loss=loss, train=train))
