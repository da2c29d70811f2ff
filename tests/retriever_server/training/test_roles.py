"""Queries and passages keep their roles: towers, prompts, hashes of specs, punctuation, orders of sets."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.data import ConcatDataset

from data.jsonl import write_jsonl
from data.records import Example
from retriever_server.encoders.spec import EncodingSpec
from retriever_server.training import run as training
from retriever_server.training.batch_samplers import Mixture, NoDuplicates, Shuffled
from retriever_server.training.builders.colbert import colbert
from retriever_server.training.builders.dense import two_towers
from retriever_server.training.mining import Rules, _limit
from tests.retriever_server.training.recipes import base, component, recipe, settings


def test_queries_go_through_the_tower_of_queries_in_training_and_in_use(rivers: Path, tmp_path: Path) -> None:
    towers = {"base": base(rivers), "passage_base": base(rivers, num_hidden_layers=2)}
    model = component("two_towers", **towers, query_prompt="miles ", passage_prompt="is ")
    data = [{**settings(rivers, "")["train"][0], "negatives": 1}]
    loss = component("MultipleNegativesRankingLoss", similarity_fct="dot")
    made = recipe(rivers, tmp_path / "run", model=model, train=data, loss=loss)
    trainer, _ = training.build_trainer(made, lambda *_: None, lambda *_: None)
    router, seen = trainer.model[0], {}
    assert len(router.sub_modules["query"][0].model.encoder.layer) == 1
    assert len(router.sub_modules["document"][0].model.encoder.layer) == 2
    for role, tower in router.sub_modules.items():
        tower[0].register_forward_pre_hook(
            lambda _, given, role=role: seen.setdefault(role, []).append(given[0]["input_ids"])
        )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, batch)
    texts = {}
    for role, given in seen.items():
        rows = [row for ids in given for row in ids]
        texts[role] = [trainer.model.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    assert len(texts["query"]) == 16 and len(texts["document"]) == 32
    assert all(text.startswith("miles long is ") for text in texts["query"])
    assert all(text.startswith("is ") and text.endswith("long") for text in texts["document"])


def test_two_towers_start_alike_from_one_base(rivers: Path) -> None:
    model = two_towers(base(rivers))
    one, two = (tower.state_dict() for tower in model[0].sub_modules.values())
    assert all(torch.equal(one[name], two[name]) for name in one if "pooler" not in name)  # which is not used
    assert (
        one["0.model.embeddings.word_embeddings.weight"].data_ptr()
        != two["0.model.embeddings.word_embeddings.weight"].data_ptr()
    )


CHANGED: dict[str, Any] = {
    "kind": "sparse", "fingerprint": "other", "dimension": 8, "query_prompt": "q: ", "passage_prompt": "p: ",
    "passage_template": "{text}", "max_tokens": 9, "pooling": "cls", "normalise": True,
    "similarity": "cosine", "inputs": "image", "image_processor": "x", "token_pooling": "rows:4",
    "query_style": "question",
}  # fmt: skip


def test_every_field_of_a_spec_but_the_name_is_in_its_hash() -> None:
    spec = EncodingSpec("name", "dense", "f", 4)
    assert set(CHANGED) | {"model"} == {field.name for field in fields(spec)}
    hashes = {replace(spec, **{name: value}).hash for name, value in CHANGED.items()}
    assert len(hashes | {spec.hash}) == len(CHANGED) + 1
    assert replace(spec, model="elsewhere").hash == spec.hash
    for name, value in CHANGED.items():
        assert f"{name}: {value!r}, here" in spec.differences(replace(spec, **{name: value}))


@pytest.mark.parametrize("punctuation", [True, False])
def test_the_punctuation_of_passages_is_kept_or_not(punctuation: bool, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c.jsonl", [{"id": "1", "text": "river, sea! (north) , ! a river"}])
    config = {"model_type": "bert", "num_hidden_layers": 1}
    of = {"config": config, "corpus": str(tmp_path / "c.jsonl"), "folder": str(tmp_path / "tiny")}
    model = colbert(of, dimension=8, query_tokens=None, skip_punctuation=not punctuation)
    kept = {}
    for task in ("query", "document"):
        out = model(dict(model.preprocess(["river , sea !"], task=task)), task=task)
        ids = out["input_ids"][0][out["attention_mask"][0].bool()]
        kept[task] = model.tokenizer.convert_ids_to_tokens(ids)
    assert {",", "!"} <= set(model.tokenizer.get_vocab()) and {",", "!"} <= set(kept["query"])
    assert ({",", "!"} <= set(kept["document"])) == punctuation
    assert bool({",", "!"} & set(kept["document"])) == punctuation and "river" in kept["document"]


@pytest.mark.parametrize("of", [Shuffled, NoDuplicates])
def test_a_set_of_a_mixture_comes_in_another_order_each_time_round(of: Any) -> None:
    sets = [Dataset.from_dict({"text": [f"{n} {i}" for i in range(size)]}) for n, size in enumerate((12, 40))]
    mixed = Mixture(ConcatDataset(sets), [of(each, 4, False, seed=7) for each in sets], None, 7, [9, 1])  # type: ignore[arg-type]
    turns = []
    for epoch in range(2):
        mixed.set_epoch(epoch)
        rows = [tuple(batch) for batch in mixed if batch[0] < 12]
        turns += [rows[at : at + 3] for at in range(0, len(rows) - 2, 3)]
    assert len(turns) >= 6 and len(set(map(tuple, turns))) == len(turns)
    assert all(sorted(row for batch in turn for row in batch) == list(range(12)) for turn in turns[:3])


@pytest.mark.parametrize(("score", "limit"), [(10.0, 9.0), (-10.0, -11.0), (0.0, 0.0)])
def test_a_relative_margin_lies_below_the_positive_whatever_its_sign(score: float, limit: float) -> None:
    assert _limit(Example("q", ("a",)), {"a": score, "b": 3.0}, Rules(relative_margin=0.1)) == limit
    assert _limit(Example("q", ("a",)), {"a": score}, Rules(margin=2.0)) == score - 2
