"""Training data and dev questions of a retriever: no scores of its own miner, no dev question."""

from __future__ import annotations

import json

import pytest

from data.errors import ConfigError, DataError
from data.jsonl import read_jsonl, write_jsonl
from retriever_server.training import run as training
from retriever_server.training.dev import DevSet
from tests.retriever_server.training.recipes import base, component, recipe, settings
from tests.samples import quick


def build(made):
    """Return what a run prepares before it trains, with all checks of its settings."""
    return training.build_trainer(made, lambda *_: None, lambda *_: None)


def dev(rivers):
    return {"queries": str(rivers / "dev.jsonl"), "qrels": str(rivers / "qrels.tsv"), "shared": "all"}


TAUGHT = {
    "ContrastiveDistillation": (component("dense"), {"contrastive_weight": 0.0}, "nothing to learn without"),
    "splade_loss": (component("splade"), {"objective": "kl"}, "nothing to learn without labels: true"),
    "MarginMSELoss": (component("dense"), {}, "MarginMSELoss takes no examples like these, without labels"),
}


def taught(name, rivers, folder):
    """Changes of a recipe to this loss; data with scores; the same with scores of its own miner's."""
    model, options, _ = TAUGHT[name]
    data = {**settings(rivers, "")["train"][0], "negatives": 1}
    rows = [{**row, "provenance": {"scores": "g", "generation": "g"}} for row in read_jsonl(data["examples"])]
    write_jsonl(folder / "own.jsonl", rows)
    changes = {"model": component(model["class_path"], base=base(rivers)), "loss": component(name, **options)}
    own = {**data, "examples": str(folder / "own.jsonl"), "labels": True}
    return {**changes, "steps": 1}, data, own


@pytest.mark.parametrize("name", TAUGHT)
def test_a_loss_that_wants_a_teacher_trains_on_nobody_elses_scores(name, rivers, tmp_path):
    changes, data, own = taught(name, rivers, tmp_path)
    says = TAUGHT[name][2]
    with pytest.raises(ConfigError, match=says):
        training.train(recipe(rivers, tmp_path / "no", **changes, train=[data]))
    with pytest.raises(DataError, match=r"own.jsonl:1: its scores are those of the retriever"):
        training.train(recipe(rivers, tmp_path / "own", **changes, train=[own]))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in TAUGHT if name != "splade_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["splade_loss", *SLOW])
def test_who_allows_scores_of_any_retriever_trains_on_them(name, rivers, tmp_path):
    changes, data, own = taught(name, rivers, tmp_path)
    losses = []
    for number, told in enumerate(({**own, "labels_of": "any"}, {**data, "labels": True})):
        made = recipe(rivers, tmp_path / str(number), **changes, train=[told])
        training.train(made, lambda step, row: losses.append(row.get("train/loss")))
    first, second = (loss for loss in losses if loss is not None)
    assert first == second > 0


def test_dev_questions_and_passages_that_stand_in_training_are_refused_unless_allowed(rivers, tmp_path):
    corpus = str(rivers / "corpus.jsonl")
    held = {"corpus": corpus, "examples": str(tmp_path / "held.jsonl")}
    rows = list(read_jsonl(rivers / "examples.jsonl"))
    write_jsonl(tmp_path / "held.jsonl", rows[12:])  # the first twelve are those of dev
    of = {**dev(rivers), "shared": "nothing"}
    build(recipe(rivers, tmp_path / "held", train=[held], dev=of))
    other = {**rows[3], "query": "the length of danb's neighbour", "query_id": "new"}
    again = {**rows[20], "query": rows[3]["query"].upper().replace(" ", "  "), "query_id": "again"}
    for name, row, says, allowed in (
        (
            "passage",
            other,
            "is answered by a passage that answers a dev question.*dev.shared: passages",
            "passages",
        ),
        ("question", again, "is a dev question, .* allow it by dev.shared: all", "all"),
    ):
        write_jsonl(tmp_path / f"{name}.jsonl", [*rows[12:], row])
        train = [held, {"corpus": corpus, "examples": str(tmp_path / f"{name}.jsonl")}]
        with pytest.raises(DataError, match=rf"{name}.jsonl:37: query .*{says}"):
            training.train(recipe(rivers, tmp_path / "no", train=train, dev=of))
        build(recipe(rivers, tmp_path / name, train=train, dev={**of, "shared": allowed}))
    with pytest.raises(DataError, match="is a dev question"):
        training.train(recipe(rivers, tmp_path / "no", train=train, dev={**of, "shared": "passages"}))


@pytest.mark.parametrize("export", quick(["last"], ["best", "last"]))
def test_an_export_worse_than_the_untrained_model_is_said(export, rivers, tmp_path, caplog, monkeypatch):
    scores = iter([0.9, 0.5, 0.4, 0.3])
    monkeypatch.setattr(DevSet, "score_model", lambda *_, **__: {"nDCG@10": next(scores)})
    made = recipe(rivers, tmp_path / "run", dev=dev(rivers), steps=5, export=export)  # the last one, too
    training.train(made)
    step, score = (2, "0.5000") if export == "best" else (5, "0.3000")
    assert f"step {step}, which is exported, is worse than the untrained model" in caplog.text
    assert f"dev nDCG@10 {score}, before 0.9000" in caplog.text
    assert json.loads((tmp_path / "run/untrained.json").read_text())["eval_nDCG@10"] == 0.9
    caplog.clear()
    training.train(made)  # finished already: said again
    assert "is worse than the untrained model" in caplog.text


@pytest.mark.slow
def test_an_export_that_is_no_worse_needs_no_warning(rivers, tmp_path, caplog, monkeypatch):
    scores = iter([0.3, 0.3, 0.5, 0.4])
    monkeypatch.setattr(DevSet, "score_model", lambda *_, **__: {"nDCG@10": next(scores)})
    training.train(recipe(rivers, tmp_path / "run", dev=dev(rivers)))
    assert "untrained" not in caplog.text
