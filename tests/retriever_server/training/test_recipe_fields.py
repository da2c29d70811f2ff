"""Each field of a recipe changes what it says it changes, by its definition, not only by being handed on."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file

from data.checkpoint import list_checkpoints
from data.corpus import Corpus
from data.errors import DataError
from data.jsonl import read_jsonl, write_jsonl
from data.settings import LoraConfig
from retriever_server.encoders.loading import saved_spec
from retriever_server.training import run as training
from retriever_server.training.dev import DevSet
from retriever_server.training.recipe import DataConfig, DevConfig, RetrieverRecipe
from tests.retriever_server.training.recipes import COUNT, base, component, recipe, settings

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONSTANT = {"steps": 1, "warmup": 0.0, "schedule": "constant_with_warmup", "learning_rate": 1e-3}


def model_of(rivers):
    return component("dense", base=base(rivers, **STILL), max_tokens=24)


def trained(rivers, out, **changes):
    """Weights by name, and the rows that were logged, of a model without dropout."""
    rows = []
    made = recipe(rivers, out, **{"model": model_of(rivers), **CONSTANT, **changes})
    folder = training.train(made, lambda step, row: rows.append({"step": step, **row}))
    return load_file(folder / "model.safetensors"), rows


def trainer_of(rivers, out, **changes):
    trainer, _ = training.build_trainer(recipe(rivers, out, **changes), lambda *_: None, lambda *_: None)
    return trainer


def start(rivers):
    found = load_file(f"{base(rivers, **STILL)['folder']}/model.safetensors")
    return {name.removeprefix("bert."): weight for name, weight in found.items()}


def moved(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in a if name in b)


def rates(rows):
    return [row["train/learning_rate"] for row in rows if "train/learning_rate" in row]


@pytest.fixture(scope="module")
def plain(rivers, tmp_path_factory):
    """The weights after a step with the defaults."""
    return trained(rivers, tmp_path_factory.mktemp("plain") / "run")[0]


@pytest.mark.slow
def test_weight_decay_takes_its_share_of_every_matrix(rivers, plain, tmp_path):
    decayed, _ = trained(rivers, tmp_path / "decayed", weight_decay=0.5)
    before = start(rivers)
    matrix = "encoder.layer.0.attention.self.query.weight"
    torch.testing.assert_close(
        decayed[matrix], plain[matrix] - 1e-3 * 0.5 * before[matrix], atol=1e-7, rtol=0
    )
    for name in ("encoder.layer.0.attention.self.query.bias", "embeddings.LayerNorm.weight"):
        assert torch.equal(decayed[name], plain[name])


def test_the_learning_rate_is_the_length_of_adams_first_step(rivers, plain, tmp_path):
    faster, _ = trained(rivers, tmp_path / "run", learning_rate=4e-3)
    for rate, after in ((1e-3, plain), (4e-3, faster)):
        assert moved(after, start(rivers)) == pytest.approx(rate, rel=0.02)


@pytest.mark.slow
def test_longer_gradients_are_shortened_and_0_is_never(rivers, tmp_path):
    free, rows = trained(rivers, tmp_path / "free", max_grad_norm=0.0)
    wide, _ = trained(rivers, tmp_path / "wide", max_grad_norm=1e6)
    short, clipped = trained(rivers, tmp_path / "short", max_grad_norm=1e-9)
    assert all(torch.equal(free[name], wide[name]) for name in free)
    assert moved(short, start(rivers)) < 0.1 * moved(free, start(rivers))  # Adam's epsilon is 1e-8
    norms = [row["train/grad_norm"] for each in (rows, clipped) for row in each if "train/grad_norm" in row]
    assert norms[0] == pytest.approx(norms[1]) and norms[0] > 1e-3


@pytest.mark.slow
def test_accumulated_micro_batches_are_one_update_of_their_mean_gradient(rivers, tmp_path):
    """Without in-batch negatives a batch of 16 and two of 8 are the same."""
    pairs = [{**settings(rivers, "")["train"][0], "negatives": 1, "form": "pair"}]
    loss, common = component("CosineSimilarityLoss"), {"train": pairs, "no_duplicates": False}
    whole, _ = trained(rivers, tmp_path / "whole", loss=loss, batch_size=16, **common)
    halves, _ = trained(rivers, tmp_path / "halves", loss=loss, batch_size=8, accumulate=2, **common)
    first, _ = trained(rivers, tmp_path / "first", loss=loss, batch_size=8, **common)
    assert moved(whole, halves) < 1e-4 < moved(whole, first)
    trainer = trainer_of(rivers, tmp_path / "epoch", batch_size=8, accumulate=2, steps=None)
    steps, step = [], trainer.training_step
    trainer.training_step = lambda *given, **named: steps.append(1) or step(*given, **named)
    trainer.train()
    assert (len(steps), trainer.state.global_step) == (6, 3)


@pytest.mark.parametrize(
    ("schedule", "falls"),
    [
        ("linear", lambda share: 1 - share),
        pytest.param("cosine", lambda share: (1 + math.cos(math.pi * share)) / 2, marks=pytest.mark.slow),
        pytest.param("constant_with_warmup", lambda share: 1.0, marks=pytest.mark.slow),
    ],
)
def test_the_rate_rises_in_the_warm_up_and_falls_as_the_schedule_says(schedule, falls, rivers, tmp_path):
    of = {"schedule": schedule, "warmup": 0.4, "steps": 5, "learning_rate": 1e-3, "save_every": 5}
    _, rows = trained(rivers, tmp_path / "run", **of)
    expected = [step / 2 if step < 2 else falls((step - 2) / 3) for step in range(5)]
    assert rates(rows) == pytest.approx([1e-3 * share for share in expected], abs=1e-9)
    assert rates(trained(rivers, tmp_path / "cold", **{**of, "warmup": 0.0, "steps": 1})[1]) == [1e-3]


@pytest.mark.slow
def test_epochs_steps_batches_and_draws_count_examples(rivers, tmp_path):
    def steps(**changes):
        made = recipe(rivers, tmp_path / "run", **{"steps": None, **changes})
        return training._steps(trainer_of(rivers, tmp_path / "run", **{"steps": None, **changes}), made)

    data = settings(rivers, "")["train"][0]
    assert steps() == 3 and steps(epochs=2.5) == 8 and steps(batch_size=6) == 8
    assert steps(steps=5, epochs=9) == 5 and steps(batch_size=6, accumulate=3) == 3
    assert steps(train=[{**data, "draws": 2}]) == 6
    assert steps(train=[{**data, "negatives": 2, "form": "pair"}], no_duplicates=False) == 9


def test_checkpoints_lines_and_what_is_kept(rivers, tmp_path):
    _, rows = trained(rivers, tmp_path / "run", steps=7, save_every=2, keep=3, log_every=3)
    assert [each.step for each in list_checkpoints(tmp_path / "run" / "checkpoints")] == [4, 6, 7]
    assert [row["step"] for row in rows if "train/loss" in row] == [2, 3, 4, 6]  # before checkpoints, too


@pytest.mark.slow
def test_the_export_is_the_best_or_the_last(rivers, tmp_path, monkeypatch):
    found, scores = {}, iter([0.1, 0.9, 0.2] * 2)
    monkeypatch.setattr(DevSet, "score_model", lambda *_, **__: {"RR": next(scores), "nDCG@10": 0.5})
    for export in ("best", "last"):
        dev = {"queries": str(rivers / "dev.jsonl"), "qrels": str(rivers / "qrels.tsv"), "shared": "all"}
        dev |= {"metrics": "MRR,nDCG@10"}  # the first decides
        folder = tmp_path / export
        found[export], rows = trained(rivers, folder, steps=4, export=export, dev=dev)
        assert {"dev/RR", "dev/nDCG@10"} <= set(rows[0])
    for export, step in (("best", 2), ("last", 4)):
        kept = load_file(tmp_path / export / f"checkpoints/step-{step:06d}/weights.safetensors")
        assert all(torch.equal(kept[f"model.0.model.{name}"], value) for name, value in found[export].items())


@pytest.mark.slow
def test_the_seed_decides_weights_and_order(rivers, tmp_path):
    one, again, other = (
        trained(rivers, tmp_path / name, seed=seed)[0] for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert moved(one, again) == 0 < moved(one, other)
    made = {"model": component("colbert", base=base(rivers), dimension=4)}
    made["loss"] = component("ContrastiveDistillation", similarity="maxsim")
    trainers = [trainer_of(rivers, tmp_path / "d", seed=seed, **made) for seed in (0, 0, 1)]
    heads = [trainer.model[1].linear.weight for trainer in trainers]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


@pytest.mark.slow
def test_the_computation_is_in_bfloat16_and_the_weights_are_not(rivers, tmp_path, monkeypatch):
    from transformers.models.bert.modeling_bert import BertLayer

    seen, forward = [], BertLayer.forward

    def noted(self, *given, **named):
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(self, *given, **named)

    monkeypatch.setattr(BertLayer, "forward", noted)
    for precision in ("float32", "bfloat16"):
        seen.clear()
        after, _ = trained(rivers, tmp_path / precision, precision=precision)
        assert any(seen) == (precision == "bfloat16")
        assert {weight.dtype for weight in after.values()} == {torch.float32}


def test_lora_has_its_rank_scale_dropout_and_places(rivers, tmp_path):
    lora = {"rank": 3, "alpha": 12.0, "dropout": 0.25, "target_modules": "query"}
    layers = [
        (name, each) for name, each in trainer_of(rivers, tmp_path / "run", lora=lora).model.named_modules()
        if hasattr(each, "lora_A")
    ]  # fmt: skip
    assert len(layers) == 1 and layers[0][0].endswith("attention.self.query")
    layer = layers[0][1]
    assert layer.lora_A["default"].weight.shape[0] == 3 and layer.scaling["default"] == 4.0
    assert layer.lora_dropout["default"].p == 0.25


def test_matryoshka_trains_the_prefixes_it_names(rivers, tmp_path):
    loss = trainer_of(rivers, tmp_path / "run", matryoshka=[8, 16]).loss
    assert list(loss.matryoshka_dims) == [32, 16, 8]


def test_workers_and_duplicates_are_those_of_the_loader(rivers, tmp_path):
    twice = [
        {**row, "query_id": f"{row['query_id']}-{n}"}
        for row in read_jsonl(rivers / "examples.jsonl")
        for n in (0, 1)
    ]
    write_jsonl(tmp_path / "twice.jsonl", twice)
    train = [{"corpus": str(rivers / "corpus.jsonl"), "examples": str(tmp_path / "twice.jsonl")}]
    for unique in (True, False):
        trainer = trainer_of(rivers, tmp_path / "run", train=train, no_duplicates=unique, workers=2)
        loader = trainer.get_train_dataloader()
        assert loader.num_workers == 2
        doubled = [batch for batch in loader.batch_sampler if len({row // 2 for row in batch}) < len(batch)]
        assert bool(doubled) != unique


@pytest.mark.slow
def test_what_is_encoded_is_saved_with_the_model(rivers, tmp_path):
    trained(rivers, tmp_path / "run", passage_template="{text} ({title})", inputs="text")
    spec = saved_spec(str(tmp_path / "run/model"))
    assert (spec.passage_template, spec.inputs) == ("{text} ({title})", "text")
    texts, trainer = [], trainer_of(rivers, tmp_path / "b", passage_template="{text} ({title})")
    texts = trainer.train_dataset[0]["positive"]
    assert texts == "the river amab is 0 miles long (amab)"


def test_a_set_has_its_negatives_labels_and_errors(rivers, tmp_path):
    data = settings(rivers, "")["train"][0]
    row = trainer_of(rivers, tmp_path / "a", train=[{**data, "negatives": 2, "labels": True}]).train_dataset[
        0
    ]
    assert list(row) == ["anchor", "positive", "negative_1", "negative_2", "label"]
    assert row["label"] == [5.0, 1.0, 0.0] and "amac" in row["negative_1"]
    broken = [*read_jsonl(rivers / "examples.jsonl"), {"query": "none", "positives": ["absent"]}]
    write_jsonl(tmp_path / "broken.jsonl", broken)
    wrong = {**data, "examples": str(tmp_path / "broken.jsonl")}
    with pytest.raises(DataError, match=r"broken.jsonl:49: .*absent"):
        trainer_of(rivers, tmp_path / "b", train=[wrong])
    assert (
        len(trainer_of(rivers, tmp_path / "c", train=[{**wrong, "on_error": "skip"}]).train_dataset) == COUNT
    )


def test_the_share_of_a_sets_batches_is_its_weight(rivers, tmp_path):
    data = settings(rivers, "")["train"][0]
    for weights in ((1.0, 3.0), (5.0, 1.0)):
        train = [{**data, "weight": weight} for weight in weights]
        sampler = trainer_of(rivers, tmp_path / "a", train=train).get_train_dataloader().batch_sampler
        assert sampler.shares.tolist() == pytest.approx([w / sum(weights) for w in weights])


def test_dev_is_cut_to_its_limit_and_searched_among_so_many_passages(rivers, tmp_path):
    given = {"queries": str(rivers / "dev.jsonl"), "qrels": str(rivers / "qrels.tsv")}

    def dev(name, **changes):
        return DevSet(DevConfig(**given, **changes), str(rivers / "corpus.jsonl"), tmp_path / name)

    assert [query.id for query in dev("a", limit=3).queries] == ["q0", "q1", "q2"]
    assert len(dev("b").corpus) == len(dev("c", passages=0).corpus) == COUNT
    few = dev("d", limit=12, passages=14).corpus
    assert all(few.get(str(i)) for i in range(12))  # every relevant passage is there
    assert 13 <= len(few) < COUNT
    write_jsonl(tmp_path / "other.jsonl", [{"id": str(i), "text": f"other {i}"} for i in range(20)])
    assert dev("e", corpus=str(tmp_path / "other.jsonl")).corpus[3].text == "other 3"
    assert [str(each) for each in dev("f", metrics="P@1,RR").measures] == ["P@1", "RR"]
    assert dev("g").corpus.content_hash == Corpus(rivers / "corpus.jsonl").content_hash


SHOWN = {
    RetrieverRecipe: """steps epochs batch_size accumulate learning_rate warmup schedule weight_decay
        max_grad_norm matryoshka lora precision no_duplicates dev save_every keep export log_every seed
        workers passage_template inputs train out
        model loss gradient_checkpointing serves device resume wandb sharding""",
    DataConfig: """corpus examples negatives labels draws weight on_error
        labels_of form shares query_prompt weights""",
    DevConfig: "queries qrels corpus metrics limit passages shared",
    LoraConfig: "rank alpha dropout target_modules",
}
"""Fields shown here, and in a line of its own those that other tests show (test_run, test_held_out,
test_mining, test_examples, test_weights, test_vision_training, test_train_retriever)."""


@pytest.mark.parametrize("of", SHOWN)
def test_no_field_is_forgotten(of):
    assert sorted(SHOWN[of].split()) == sorted(field.name for field in dataclasses.fields(of))
