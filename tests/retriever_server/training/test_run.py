"""Training a retriever: what is saved serves as it was trained, resumes bit for bit, and stops at NaN."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import sentence_transformers
import torch
from safetensors.torch import load_file
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from data.checkpoint import list_checkpoints
from data.errors import ConfigError, DataError, RunStopped
from retriever_server.encoders.loading import load_encoder
from retriever_server.encoders.sentence import SentenceEncoder
from retriever_server.encoders.spec import rows_of, similarities
from retriever_server.training import export
from retriever_server.training import run as training
from retriever_server.training.build_components import build_loss, build_model, prepare
from retriever_server.training.export import check_saved, check_similarity, save_encoder
from tests.retriever_server.training.recipes import base, component, recipe, settings
from tests.samples import quick

TEXTS = ["how long is danb", "the river rheil is 9 miles long"]
MNRL = "MultipleNegativesRankingLoss"
METHODS = {
    "two_towers": (
        {},
        component(MNRL, similarity_fct="dot", scale=1.0),
        {"negatives": 1},
    ),
    "splade": (
        {},
        component(
            "SpladeLoss",
            loss=component("SparseMultipleNegativesRankingLoss"),
            document_regularizer_weight=1e-3,
            query_regularizer_weight=1e-3,
        ),
        {},
    ),
    "colbert": (
        {"dimension": 16, "query_tokens": 12},
        component("ContrastiveDistillation", similarity="maxsim"),
        {"negatives": 2, "labels": True},
    ),
    "dense": ({"pooling": "cls"}, component("ContrastiveDistillation"), {"negatives": 2, "labels": True}),
}


def dev(rivers):
    return {"queries": str(rivers / "dev.jsonl"), "qrels": str(rivers / "qrels.tsv"), "shared": "all"}


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def every_weight(folder):
    """Return the weights of all towers: {file and name: values}."""
    files = (folder / "model").rglob("*.safetensors")
    return {(str(f.relative_to(folder)), name): v for f in files for name, v in load_file(f).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", quick(["dense"], METHODS))
def test_what_was_trained_serves_and_loads_in_plain_sentence_transformers(method, rivers, tmp_path):
    options, loss, data = METHODS[method]
    model = component(method, base=base(rivers), **options)
    train = [{**settings(rivers, "")["train"][0], **data}]
    rows = []
    made = recipe(rivers, tmp_path / "run", model=model, loss=loss, train=train, dev=dev(rivers))
    folder = training.train(made, lambda step, row: rows.append(row))
    scored = [row["dev/nDCG@10"] for row in rows if "dev/nDCG@10" in row]
    assert len(scored) == 4  # before, and at every checkpoint
    assert all(0 <= score <= 1 for score in scored)
    encoder = load_encoder(str(folder), device="cpu")
    of = {"dense": "SentenceTransformer", "sparse": "SparseEncoder", "multi": "MultiVectorEncoder"}
    plain = getattr(sentence_transformers, of[encoder.spec.kind])(str(folder), device="cpu")
    for role, encode in (("query", plain.encode_query), ("passage", plain.encode_document)):
        ours, theirs = encoder.encode(TEXTS, role), encode(TEXTS)
        for i in range(len(TEXTS)):
            row = theirs[i].to_dense() if encoder.spec.kind == "sparse" else theirs[i]
            row = np.atleast_2d(np.asarray(row))
            if encoder.spec.normalise or encoder.spec.kind == "dense":
                row = row / np.linalg.norm(row, axis=1, keepdims=True)
            assert similarities(rows_of(ours, i), row).min() > 0.99999


def test_a_reranker_is_trained_on_pairs_and_read_by_the_scorer_that_serves(rivers, tmp_path):
    from data.records import Passage
    from retriever_server.retrievers.rerank import CrossEncoder

    pairs = [{**settings(rivers, "")["train"][0], "negatives": 2, "form": "pair"}]
    changes = {"model": component("cross_encoder", base=base(rivers)), "train": pairs}
    changes |= {"loss": {"class_path": "BinaryCrossEntropyLoss"}, "dev": dev(rivers)}
    with pytest.raises(ConfigError, match=r"a reranker reads '\{contents\}'"):
        training.train(recipe(rivers, tmp_path / "no", **changes))
    made = recipe(rivers, tmp_path / "run", **changes, passage_template="{contents}")
    rows = []
    folder = training.train(made, lambda step, row: rows.append(row))
    assert any("dev/nDCG@10" in row for row in rows)
    score = CrossEncoder(str(folder), device="cpu").score([("how long is danb", Passage("1", "a river"))])
    assert math.isfinite(score[0])


class Killed(Exception):
    """As if the process had ended."""


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{}, {"rank": 2, "dropout": 0.1}], ids=["all weights", "lora"])
def test_resumed_equals_unbroken_bit_for_bit(lora, rivers, tmp_path):
    def kill(step, steps):
        if step == 5:
            raise Killed

    whole = recipe(rivers, tmp_path / "whole", lora=lora)  # 3 batches an epoch: into the second
    broken = dataclasses.replace(whole, out=str(tmp_path / "broken"))
    training.train(whole)
    with pytest.raises(Killed):
        training.train(broken, progress=kill)
    starts = []
    training.train(broken, on_start=starts.append)
    assert starts == [4]
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


@pytest.mark.slow
def test_checkpoints_are_pruned_but_for_the_best_which_is_exported(rivers, tmp_path):
    scores = iter([0.1, 0.3, 0.9, 0.2, 0.1])
    made = recipe(rivers, tmp_path / "run", steps=8, keep=1, dev=dev(rivers))
    trainer, _ = training.build_trainer(made, lambda *_: None, lambda *_: None)
    trainer.evaluator._score = lambda model: {"nDCG@10": next(scores)}
    trainer.evaluate()
    trainer.train()
    assert [each.step for each in list_checkpoints(tmp_path / "run" / "checkpoints")] == [4, 8]
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    folder = training.train(made)
    kept = load_file(tmp_path / "run/checkpoints/step-000004/weights.safetensors")
    exported = dict(sentence_transformers.SentenceTransformer(str(folder), device="cpu").named_parameters())
    assert [n for n, value in exported.items() if not torch.equal(value, kept[f"model.{n}"])] == []
    assert any(not torch.equal(before[name], value) for name, value in exported.items())


def test_a_loss_that_is_no_number_stops_before_the_weights_are_touched(rivers, tmp_path):
    made = recipe(rivers, tmp_path / "run")
    trainer, _ = training.build_trainer(made, lambda *_: None, lambda *_: None)
    compute, calls, kept = trainer.compute_loss, [], {}

    def poisoned(*args, **kwargs):
        calls.append(1)
        loss = compute(*args, **kwargs)
        if len(calls) < 4:
            return loss
        kept.update({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
        return loss * float("nan")

    trainer.compute_loss = poisoned
    with pytest.raises(RunStopped, match=r"step 4: the loss is nan; the last checkpoint is kept in .*run"):
        trainer.train()
    assert [each.step for each in list_checkpoints(tmp_path / "run" / "checkpoints")] == [2]
    assert all(torch.equal(p, kept[n]) for n, p in trainer.model.named_parameters())


@pytest.mark.slow
def test_matryoshka_trains_prefixes_and_an_index_may_keep_only_these(rivers, tmp_path):
    folder = training.train(recipe(rivers, tmp_path / "run", matryoshka=[16, 8]))
    short = load_encoder(str(folder), dimension=8, device="cpu").encode(TEXTS, "passage")
    assert short.shape == (2, 8) and np.allclose(np.linalg.norm(short, axis=1), 1, atol=1e-5)
    with pytest.raises(ConfigError, match="matryoshka = \\[64\\]: must be <= 32"):
        training.train(recipe(rivers, tmp_path / "no", matryoshka=[64]))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dense", "two_towers"])
def test_lora_changes_only_what_it_stands_beside_and_is_merged(method, rivers, tmp_path):
    lora = {"rank": 2, "target_modules": "query,value"}
    model = component(method, base=base(rivers), max_tokens=24, normalise=True)
    folder = training.train(recipe(rivers, tmp_path / "run", model=model, lora=lora))
    start = load_file(f"{base(rivers)['folder']}/model.safetensors")
    files = list(folder.rglob("model.safetensors"))
    assert len(files) == (2 if method == "two_towers" else 1)
    for trained in map(load_file, files):
        assert not any("lora" in name for name in trained)
        known = {name: start[f"bert.{name}"] for name in trained if f"bert.{name}" in start}
        changed = {name for name, weight in known.items() if not torch.equal(weight, trained[name])}
        assert changed == {f"encoder.layer.0.attention.self.{n}.weight" for n in ("query", "value")}
    assert load_encoder(str(folder), device="cpu").spec.kind == "dense"
    wrong = recipe(rivers, tmp_path / "no", lora={"rank": 2, "target_modules": "nothing_like_it"})
    with pytest.raises(ConfigError, match=r"lora.target_modules = 'nothing_like_it'"):
        training.train(wrong)


PAIRS = {"negatives": 2, "form": "pair"}
RECOMPUTED = {
    **{name: (component(name, **METHODS[name][0]), METHODS[name][1:], {}) for name in METHODS},
    "decoder": (component("decoder", pooling="mean", two_way=True), METHODS["dense"][1:], {"rank": 2}),
    "cross_encoder": (component("cross_encoder"), (component("BinaryCrossEntropyLoss"), PAIRS), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", RECOMPUTED)
def test_gradient_checkpointing_recomputes_and_changes_no_weight(method, rivers, tmp_path, monkeypatch):
    model, (loss, data), lora = RECOMPUTED[method]
    config = {"model_type": "llama"} if method == "decoder" else {}
    config = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, **config}
    model = component(model["class_path"], **model["init_args"], base=base(rivers, **config))
    made = recipe(
        rivers, "", model=model, loss=loss, lora=lora, steps=2,
        train=[{**settings(rivers, "")["train"][0], **data}],
        passage_template="{contents}" if method == "cross_encoder" else "{title}\n{text}",
    )  # fmt: skip
    passes = []
    layer = LlamaDecoderLayer if method == "decoder" else BertLayer
    forward = layer.forward

    def counted(self, *given, **named):
        passes.append(torch.is_grad_enabled())
        return forward(self, *given, **named)

    monkeypatch.setattr(layer, "forward", counted)
    with_gradient, found = [], []
    for checkpointing in (False, True):
        passes.clear()
        out = str(tmp_path / str(checkpointing))
        training.train(dataclasses.replace(made, out=out, gradient_checkpointing=checkpointing))
        with_gradient.append(sum(passes))
        found.append(every_weight(tmp_path / str(checkpointing)))
    assert with_gradient[1] == 2 * with_gradient[0] > 0
    assert same(*found)


def test_several_sets_have_their_own_instructions(rivers, tmp_path):
    one = settings(rivers, "")["train"][0]
    sets = [{**one, "query_prompt": "a: "}, {**one, "query_prompt": "b: ", "weight": 3.0}]
    trainer, _ = training.build_trainer(
        recipe(rivers, tmp_path / "run", train=sets), lambda *_: None, lambda *_: None
    )
    prompts = trainer.args.prompts
    assert [of["anchor"] for of in prompts.values()] == ["a: ", "b: "]
    trainer.train()
    with pytest.raises(ConfigError, match=r"with a single set say model\.init_args\.query_prompt"):
        training.train(recipe(rivers, tmp_path / "no", train=sets[:1]))


def test_a_model_serves_only_under_the_spec_it_was_trained_under(rivers, tmp_path):
    made = recipe(rivers, tmp_path / "run", steps=1, passage_template="{title}: {text}")
    folder = str(training.train(made))
    assert load_encoder(folder, device="cpu").spec.passage_template == "{title}: {text}"
    with pytest.raises(ConfigError, match=r"trained under another spec .query_prompt: 'query: ', here 'q'"):
        load_encoder(folder, query_prompt="q", device="cpu")
    with pytest.raises(ConfigError, match=r"trained under another spec .passage_template"):
        load_encoder(folder, passage_template="{text}", device="cpu")


@pytest.mark.slow
def test_training_under_another_spec_than_the_index_in_service_is_refused(rivers, tmp_path):
    from data.corpus import Corpus
    from retriever_server.indexes.manifest import index_kind

    made = build_model(recipe(rivers, tmp_path))
    save_encoder(made.model, made.spec, tmp_path / "served")
    encoder = load_encoder(str(tmp_path / "served"), device="cpu")
    index_kind("flat").build(Corpus(rivers / "corpus.jsonl"), tmp_path / "index", encoder)
    serves = str(tmp_path / "index")
    training.train(recipe(rivers, tmp_path / "run", serves=serves, steps=1))
    other = component("dense", base=base(rivers), query_prompt="ask: ", max_tokens=24)
    with pytest.raises(ConfigError, match=r"its model has another encoding spec .query_prompt.*here 'ask: '"):
        training.train(recipe(rivers, tmp_path / "no", serves=serves, model=other))


def test_a_loss_by_another_similarity_than_the_index_is_refused(rivers, tmp_path):
    made = recipe(rivers, tmp_path, model=component("dense", base=base(rivers), normalise=False))
    built = build_model(made)
    with pytest.raises(ConfigError, match="scores by cosine, the index that will serve by dot"):
        check_similarity(build_loss(made, built), built.spec)


def test_a_model_that_is_not_saved_whole_is_refused_before_training(rivers, tmp_path):
    built = build_model(recipe(rivers, tmp_path))
    model, spec = built.model, built.spec
    save_encoder(model, spec, tmp_path / "saved")
    check_saved(model, spec, tmp_path / "saved")
    with torch.no_grad():
        model[0].auto_model.embeddings.word_embeddings.weight += torch.randn(1, 32)
    with pytest.raises(DataError, match="query vectors changed when it was saved"):
        check_saved(model, spec, tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config_sentence_transformers.json").read_text())
    config["prompts"]["query"] = "changed: "
    (tmp_path / "saved/config_sentence_transformers.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"is another one .query_prompt: 'query: ', here 'changed: '"):
        check_saved(model, spec, tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"trained under another spec"):
        load_encoder(str(tmp_path / "saved"), device="cpu")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": component("dence", base="x")}, "class_path: 'dence' must be one of colbert, cross_enc"),
        ({"model": component("dense", base="x", pool="cls")}, "init_args.pool: unknown key; dense takes"),
        ({"model": component("dense")}, "model.init_args: missing: base"),
        ({"model": component("dense", base="/no/where")}, "model.init_args.base = '/no/where': no folder"),
        ({"model": component("collections.Counter")}, "collections.Counter is no SentenceTransformer or"),
        ({"model": {"class": "dense"}}, "model: must be a mapping of class_path and init_args"),
        ({"loss": component("NoLoss")}, "loss.class_path: 'NoLoss' must be one of ContrastiveDistillation"),
        ({"loss": component(MNRL, temperature=1)}, "unknown key; Multiple.* takes scale"),
        ({"loss": component(MNRL, scale=-1)}, "Scale must be a positive value"),
        ({"loss": component(MNRL, similarity_fct="l2")}, "must be one of cosine, dot"),
        ({"steps": 0}, "steps = 0: must be >= 1"),
        ({"warmup": 1.0}, r"warmup = 1.0: must be in \[0, 1\)"),
        ({"passage_template": "{abstract}"}, "passage_template"),
        ({"dev": {"queries": "x"}}, "dev.qrels = None: must be given together"),
        ({"device": "cuda"}, "device = 'cuda': must be cpu or auto"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_in_one_line(changes, says, rivers, tmp_path):
    if "device" in changes and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    model = changes.get("model", {}).get("init_args", {})
    if model.get("base") == "x":
        model["base"] = base(rivers)
    with pytest.raises(ConfigError, match=says) as raised:
        training.train(recipe(rivers, tmp_path / "run", **changes))
    assert "\n" not in str(raised.value)


def test_the_base_of_a_builder_of_ones_own_is_whatever_that_builder_takes(rivers, tmp_path):
    own = recipe(rivers, tmp_path / "run", model=component("my_models.build", base="a corpus"))
    assert prepare(own).sets


@pytest.mark.slow
def test_what_was_trained_in_bfloat16_is_compared_with_what_it_serves_as_in_float32(
    rivers, tmp_path, monkeypatch
):
    vectors = []

    def note(model, spec, folder):
        encoders = SentenceEncoder(model, spec), load_encoder(str(folder))
        vectors.append([each.encode(TEXTS, "query").values for each in encoders])

    monkeypatch.setattr(export, "check_saved", note)
    model = component("colbert", base=base(rivers), dimension=16, query_tokens=12)
    loss = component("ContrastiveDistillation", similarity="maxsim", distill_weight=0.0)
    training.train(recipe(rivers, tmp_path / "out", model=model, loss=loss, precision="bfloat16"))
    trained, served = vectors[-1]  # those of before training come first
    np.testing.assert_allclose(trained, served, atol=1e-6)
