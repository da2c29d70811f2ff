"""Gradients of the losses: cached and gathered equal those of one batch in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.losses.merged_forward import column_merging_disabled
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer import losses as dense
from sentence_transformers.util import dot_score

from data.jsonl import write_jsonl
from retriever_server.training.builders.colbert import colbert
from retriever_server.training.builders.dense import dense as dense_model
from retriever_server.training.builders.sparse import unicoil
from retriever_server.training.builders.tiny import tiny_base
from retriever_server.training.losses.distillation import ContrastiveDistillation, WeightedInfoNCE
from retriever_server.training.losses.info_nce import Qwen3InfoNCE
from retriever_server.training.losses.splade import splade_loss

TEXTS = [f"passage {i} of the {'long ' * (i % 4)}river" for i in range(18)]
TEACHER = torch.tensor([[3.0, 1.0], [0.0, 2.0], [1.0, 1.0], [5.0, 4.0], [2.0, 0.5], [0.3, 0.1]])
Columns = list[dict[str, Any]]


def base(folder: Path) -> dict[str, Any]:
    if not (folder / "c.jsonl").exists():
        write_jsonl(folder / "c.jsonl", [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)])
    config = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1}
    return {"config": config, "corpus": str(folder / "c.jsonl"), "folder": str(folder / "tiny")}


def columns(model: Any, rows: slice = slice(0, 6)) -> Columns:
    texts = [TEXTS[6 * column : 6 * column + 6][rows] for column in range(3)]
    return [model.preprocess(each) for each in texts]


def gradient(model: Any, compute: Callable[[], Any], seed: int = 0) -> torch.Tensor:
    """Return the gradients of all weights, of one backward pass under fixed dropout."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = compute()
    total: Any = sum(loss.values()) if isinstance(loss, dict) else loss
    total.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def losses(model: Any, size: int | None, temperature: float) -> dict[str, Any]:
    """With GradCache in mini-batches of `size`, or without."""
    cached: Any = dense.CachedMultipleNegativesRankingLoss
    theirs = {"scale": 1 / temperature, "similarity_fct": dot_score}
    return {
        "InfoNCE": cached(model, mini_batch_size=size, **theirs)
        if size
        else dense.MultipleNegativesRankingLoss(model, **theirs),
        "contrast and distillation": ContrastiveDistillation(model, "dot", temperature, mini_batch_size=size),
        "SPLADE": splade_loss(model, "kl", 0.1, 0.2, temperature, contrastive_weight=1, mini_batch_size=size),
    }


@pytest.mark.parametrize("temperature", [1.0, 0.02])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_grad_cache_equals_the_whole_batch(tmp_path: Path, temperature: float, dropout: float) -> None:
    """Tevatron's dropped the temperature; with dropout, the second pass must see what the first saw."""
    model = unicoil(base(tmp_path)).double().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    size = 6 if dropout else 4  # mini-batches of other sizes draw other dropout
    for name, cached in losses(model, size, temperature).items():
        whole = losses(model, None, temperature)[name]
        labels = TEACHER.double() if name != "InfoNCE" else None
        with column_merging_disabled():  # the passages of all columns in one pass would, too
            here = [gradient(model, partial(of, columns(model), labels)) for of in (cached, whole)]
        torch.testing.assert_close(here[0], here[1], atol=1e-6, rtol=1e-5)


def test_a_cached_loss_keeps_apart_the_gradients_of_two_batches(tmp_path: Path) -> None:
    """A second forward pass before the first backward pass has given the first batch's wrong gradients."""
    model = unicoil(base(tmp_path)).double().eval()
    gradients = []
    for size in (2, None):
        loss = losses(model, size, 0.1)["contrast and distillation"]
        model.zero_grad()
        first, second = (loss(columns(model, rows)) for rows in (slice(0, 3), slice(3, 6)))
        (first + 3 * second).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_the_analytic_gradient_is_the_slope_of_the_loss(tmp_path: Path) -> None:
    scores = torch.randn(3, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = ContrastiveDistillation(None, "dot", 0.5)
    assert torch.autograd.gradcheck(
        lambda s: loss._of_scores(s, TEACHER[:3].double()), scores.requires_grad_()
    )


KINDS = ("InfoNCE", "Qwen3 InfoNCE", "contrast and distillation", "maxsim", "weighted")
WEIGHTS = torch.tensor([[0.5, 3.0], [1.0, 0.3], [2.0, 1.0], [0.7, 0.3], [1.3, 3.0], [0.5, 1.0]])
LABELS = {"contrast and distillation": TEACHER, "maxsim": TEACHER, "weighted": WEIGHTS}


def process(rank: int, folder: str) -> None:
    """One of two: half of the batch, gathered; writes its losses and gradients."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    for kind in KINDS:
        model, loss = gathered(Path(folder), kind, True)
        batch = columns_of(kind, model, slice(3 * rank, 3 * rank + 3))
        labels = LABELS[kind][3 * rank : 3 * rank + 3] if kind in LABELS else None
        value = loss([dict(each) for each in batch], labels).item()
        mine = gradient(model, partial(loss, batch, labels))
        torch.distributed.all_reduce(mine)
        torch.save((value, mine / 2), f"{folder}/{kind}-{rank}.pt")
    torch.distributed.destroy_process_group()


def gathered(folder: Path, kind: str, gather: bool) -> tuple[Any, Any]:
    torch.manual_seed(0)
    if kind == "maxsim":
        model = colbert(base(folder), dimension=8, query_tokens=16).double().eval()
        return model, ContrastiveDistillation(model, "maxsim", 0.1, gather_across_devices=gather)
    model = dense_model(base(folder)).double().eval()
    if kind == "InfoNCE":
        return model, dense.MultipleNegativesRankingLoss(model, 10.0, dot_score, gather_across_devices=gather)
    if kind == "Qwen3 InfoNCE":
        return model, Qwen3InfoNCE(model, 0.1, gather_across_devices=gather)
    of = WeightedInfoNCE if kind == "weighted" else ContrastiveDistillation
    return model, of(model, "dot", 0.1, gather_across_devices=gather)


def columns_of(kind: str, model: Any, rows: slice) -> Columns:
    if kind != "maxsim":
        return columns(model, rows)
    tasks = ("query", "document", "document")
    texts = [TEXTS[6 * column : 6 * column + 6][rows] for column in range(3)]
    return [
        model.preprocess(each, task=task) | {"task": task} for each, task in zip(texts, tasks, strict=True)
    ]


@pytest.mark.slow
def test_two_processes_that_gather_equal_one(tmp_path: Path) -> None:
    gathered(tmp_path, "InfoNCE", False)  # the tiny model is made once
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)  # type: ignore[attr-defined]
    for kind in KINDS:
        model, loss = gathered(tmp_path, kind, False)
        batch, labels = columns_of(kind, model, slice(0, 6)), LABELS.get(kind)
        whole = loss([dict(each) for each in batch], labels).item()
        slope = gradient(model, partial(loss, batch, labels))
        halves = [torch.load(tmp_path / f"{kind}-{rank}.pt") for rank in range(2)]
        exact = 1e-5 if kind == "maxsim" else 1e-6  # its scores are of float32
        assert sum(value for value, _ in halves) / 2 == pytest.approx(whole, abs=exact), kind
        torch.testing.assert_close(halves[0][1], slope, atol=exact, rtol=1e-4)


def test_queries_are_filled_up_with_masks_that_count(tmp_path: Path) -> None:
    """ColBERT's query augmentation: [MASK] up to the length, scored though not attended to."""
    model = colbert(base(tmp_path), dimension=8, query_tokens=16).eval()
    assert isinstance(model[0], Transformer)
    features = model.preprocess(["river"], task="query")
    out = model(dict(features), task="query")
    assert out["attention_mask"].sum() == 16 > features["attention_mask"].sum()
    masks = features["input_ids"][features["query_expansion_positions"].bool()]
    assert set(masks.tolist()) == {model.tokenizer.mask_token_id}
    passage = model(model.preprocess(["river, of the, river!"], task="document"), task="document")
    pieces = model.tokenizer.convert_ids_to_tokens(
        passage["input_ids"][0][passage["attention_mask"][0].bool()]
    )
    assert not {",", "!"} & set(pieces)


def test_without_projection_and_filling_the_vectors_are_the_bases_own(tmp_path: Path) -> None:
    """Late interaction over a model that is trained already: nothing random stands between."""
    model = colbert(base(tmp_path), dimension=None, query_tokens=None).eval()
    model.save(str(tmp_path / "saved"))
    for each in (model, MultiVectorEncoder(str(tmp_path / "saved"), device="cpu").eval()):
        features: Any = each.preprocess(["river"], task="query")
        tokens = {key: features[key] for key in ("input_ids", "attention_mask")}
        out = each(features, task="query")
        transformer: Any = each.transformers_model
        own = transformer(**tokens).last_hidden_state
        assert out["token_embeddings"].shape == own.shape == (1, 3, 32)
        torch.testing.assert_close(out["token_embeddings"], torch.nn.functional.normalize(own, dim=-1))


def test_a_marker_is_one_token_before_and_after_saving(tmp_path: Path) -> None:
    """BERT's [unused0] falls into five pieces where it stands in a text and nobody says what it is."""
    folder = tiny_base(**base(tmp_path))
    file = Path(folder) / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for spare, word in zip(
        ("[unused0]", "[unused1]"), sorted(vocabulary, key=vocabulary.get)[-2:], strict=True
    ):
        vocabulary[spare] = vocabulary.pop(word)
    file.write_text(json.dumps(tokenizer))
    model = colbert(folder, dimension=8, query_tokens=16)
    model.save(str(tmp_path / "saved"))
    for each in (model, MultiVectorEncoder(str(tmp_path / "saved"), device="cpu")):
        assert each.prompts["query"] == "[unused0] "
        ids = each.preprocess(["river"], prompt=each.prompts["query"], task="query")["input_ids"][0]
        assert each.tokenizer.convert_ids_to_tokens(ids[:3].tolist()) == ["[CLS]", "[unused0]", "river"]
