"""uniCOIL, DeepImpact and BGE-M3: what they weigh, saved and served; the losses by their formulae."""

from __future__ import annotations

from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.corpus import Corpus
from data.errors import ConfigError
from data.jsonl import write_jsonl
from retriever_server.encoders.loading import load_encoder
from retriever_server.indexes.manifest import index_kind
from retriever_server.retrievers.fuse import Fuse
from retriever_server.training.builders.m3 import m3
from retriever_server.training.builders.sparse import deepimpact, splade, unicoil
from retriever_server.training.losses.m3 import M3Loss
from retriever_server.training.losses.splade import splade_loss

TEXTS = ["the river of the north", "a small red fox", "the old city is not the capital", "blue sea"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("base")
    write_jsonl(folder / "corpus.jsonl", [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)])
    config = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1}
    return {"config": config, "corpus": str(folder / "corpus.jsonl"), "folder": str(folder / "tiny")}


def words_of(encoder: Any, row: np.ndarray) -> set[str]:
    return set(encoder._model.tokenizer.convert_ids_to_tokens(row.nonzero()[0].tolist()))


@pytest.mark.parametrize("make", [unicoil, deepimpact])
def test_only_words_of_the_text_have_weights_and_a_saved_model_gives_the_same(
    make: Any, base: Any, tmp_path: Path
) -> None:
    model = make(base)
    with torch.no_grad():  # so that weights differ and all are above 0
        model.state_dict()[next(k for k in model.state_dict() if k.endswith("head.0.weight"))].mul_(5)
    model.save(str(tmp_path / "model"))
    encoder = load_encoder(str(tmp_path / "model"))
    assert encoder.spec.kind == "sparse" and encoder.spec.dimension == len(model.tokenizer)
    passages = encoder.encode(TEXTS, "passage").toarray()
    queries = encoder.encode(TEXTS, "query").toarray()
    for text, passage, query in zip(TEXTS, passages, queries, strict=True):
        pieces = set(model.tokenizer.tokenize(text))
        assert words_of(encoder, passage) <= pieces and words_of(encoder, query) <= pieces
    if make is deepimpact:
        assert set(np.unique(queries)) == {0, 1}
        assert words_of(encoder, queries[0]) == set(model.tokenizer.tokenize(TEXTS[0]))
    encoded = model.eval().encode_document(TEXTS, convert_to_sparse_tensor=False)
    np.testing.assert_allclose(passages, encoded.numpy(), atol=1e-5)


def test_first_and_largest_occurrence_are_different_encoders(base: Any, tmp_path: Path) -> None:
    specs, model = [], unicoil(base)
    for occurrence in ("first", "max"):
        model[1].occurrence, model[1].pooling_mode = occurrence, f"{occurrence} of 1"
        model.save(str(tmp_path / occurrence))
        specs.append(load_encoder(str(tmp_path / occurrence)).spec)
    assert specs[0].hash != specs[1].hash
    assert specs[0].fingerprint == specs[1].fingerprint


@pytest.mark.parametrize("objective", ["contrastive", "margin_mse", "kl"])
def test_splade_s_loss_is_its_objective_plus_flops(objective: Any, base: Any) -> None:
    model = splade(base)
    model.eval()
    columns = [model.preprocess(texts) for texts in (TEXTS[:2], TEXTS[1:3], TEXTS[2:])]
    teacher = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    parts = splade_loss(model, objective, 0.01, 0.02, temperature=2.0)(columns, teacher)
    q, p, n = (model(dict(each))["sentence_embedding"] for each in columns)
    expected = 0.01 * (torch.cat([p, n]).mean(0) ** 2).sum() + 0.02 * (q.mean(0) ** 2).sum()
    scores = torch.stack([q @ p.T, q @ n.T], 2) / 2.0
    own = scores[[0, 1], [0, 1]]
    if objective == "contrastive":
        expected += sum(scores[i].flatten().logsumexp(0) - scores[i, i, 0] for i in range(2)) / 2
    elif objective == "kl":
        soft = teacher.softmax(1)
        expected += (soft * (soft.log() - own.log_softmax(1))).sum() / 2
    else:
        expected += ((2 * (own[:, 0] - own[:, 1]) - (teacher[:, 0] - teacher[:, 1])) ** 2).mean()
    assert sum(parts.values()).item() == pytest.approx(expected.item(), rel=1e-5)


def naive_m3(kinds: list[Tensor], share: float, weight: float) -> float:
    size, _, columns = kinds[0].shape
    dense, sparse, multi = (kind.flatten(1).tolist() for kind in kinds)
    ensemble = [
        [d + share * s + m for d, s, m in zip(*rows, strict=True)]
        for rows in zip(dense, sparse, multi, strict=True)
    ]

    def log_softmax(row: list[float]) -> list[float]:
        normaliser = log(sum(map(exp, row)))
        return [score - normaliser for score in row]

    def contrast(matrix: list[list[float]]) -> float:
        return -sum(log_softmax(row)[i * columns] for i, row in enumerate(matrix)) / size

    def taught(matrix: list[list[float]]) -> float:
        rows = zip(matrix, ensemble, strict=True)
        return (
            -sum(exp(t) * s for a, b in rows for s, t in zip(log_softmax(a), log_softmax(b), strict=True))
            / size
        )

    contrasts = (contrast(dense) + contrast(ensemble) + weight * contrast(sparse) + contrast(multi)) / 4
    return (contrasts + (taught(dense) + weight * taught(sparse) + taught(multi)) / 3) / 2


def test_m3_s_loss_is_the_formula_and_the_ensemble_teaches_without_learning() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.randn(3, 3, 2, generator=generator, dtype=torch.float64) for _ in range(3)]
    loss = M3Loss(None, sparse_share=0.3, sparse_weight=0.1)
    assert loss.of_scores(*kinds).item() == pytest.approx(naive_m3(kinds, 0.3, 0.1), abs=1e-6)
    for kind in kinds:
        kind.requires_grad_()
    loss.of_scores(*kinds).backward()
    step, gradient = 1e-5, kinds[1].grad
    ensemble = (kinds[0] + 0.3 * kinds[1] + kinds[2]).detach()
    nudged = kinds[1].detach().clone()
    nudged[0, 1, 0] += step

    def frozen(sparse: Tensor) -> float:  # the loss where the teacher stays what it was
        live = M3Loss(None, self_distillation=False).of_scores(kinds[0], sparse, kinds[2])
        target = ensemble.flatten(1).softmax(1)
        of = [(1.0, kinds[0]), (0.1, sparse), (1.0, kinds[2])]
        taught = sum(w * -(target * k.flatten(1).log_softmax(1)).sum(1).mean() for w, k in of)
        return float((live + taught / 3).detach() / 2)

    slope = (frozen(nudged) - frozen(kinds[1].detach())) / step
    assert gradient is not None and slope == pytest.approx(float(gradient[0, 1, 0]), abs=1e-5)


def test_the_three_encoders_of_m3_give_the_scores_it_was_trained_with(base: Any, tmp_path: Path) -> None:
    model = m3(base, dimension=16).eval()
    with torch.no_grad():
        queries, passages = (model(model.preprocess(texts)) for texts in (TEXTS[:2], TEXTS))
        scores = [each[:, :, 0] * 0.02 for each in M3Loss(model).scores(queries, [passages])]
    for kind, part in model[1].parts(model).items():
        part.save(str(tmp_path / kind))
    write_jsonl(tmp_path / "c.jsonl", [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)])
    corpus, indexes = Corpus(tmp_path / "c.jsonl"), []
    for kind, expected in zip(("dense", "sparse", "multi"), scores, strict=True):
        encoder = load_encoder(str(tmp_path / kind))
        assert encoder.spec.kind == kind
        of = index_kind({"dense": "flat", "sparse": "inverted", "multi": "maxsim"}[kind])
        index: Any = of.build(corpus, tmp_path / f"index-{kind}", encoder, "float32")
        indexes.append(index)
        for row, query, hits in zip(expected, TEXTS, index.search(TEXTS[:2], 4), strict=False):
            found = {hit.passage.id: hit.score for hit in hits}
            tokens = len(model.tokenizer(query).input_ids) - 1 if kind == "multi" else 1
            got = [found.get(str(i), 0.0) / tokens for i in range(4)]
            assert got == pytest.approx(row.tolist(), abs=1e-4)
    assert [hits[0].passage.id for hits in Fuse(indexes).search(TEXTS, 2)] == list("0123")


def test_the_trained_trunk_loads_as_a_dense_encoder(base: Any, tmp_path: Path) -> None:
    model = m3(base).eval()
    model.save(str(tmp_path / "m3"))
    encoder = load_encoder(str(tmp_path / "m3"))
    np.testing.assert_allclose(encoder.encode(TEXTS, "passage"), model.encode(TEXTS), atol=1e-5)
    with pytest.raises(ConfigError, match="its tokenizer puts none first"):
        config = {"model_type": "llama", "num_key_value_heads": 2}
        m3({**base, "config": config, "folder": str(tmp_path / "llama")})
