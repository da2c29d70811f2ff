"""The formulae of the losses and poolings, against naive loops and against sentence-transformers."""

from __future__ import annotations

from math import exp, log
from typing import Any

import pytest
import torch
from sentence_transformers.multi_vector_encoder import losses as multi
from sentence_transformers.sentence_transformer import losses as dense
from sentence_transformers.sparse_encoder import losses as sparse
from sentence_transformers.sparse_encoder.modules import SpladePooling
from sentence_transformers.util import dot_score, maxsim
from torch import Tensor, nn

from retriever_server.encoders.token_weights import pool_impacts
from retriever_server.training.losses.distillation import ContrastiveDistillation, distillation, maxsim_scores

B, N, D = 4, 3, 6
T = 0.05


class Given(nn.Module):
    """A model whose features are the vectors, with the mask that MultiVectorMask would leave."""

    def forward(self, features: dict, task: str | None = None) -> dict:
        return dict(features)

    def __getitem__(self, i: int) -> nn.Module:
        return self


GIVEN: Any = Given()


def vectors(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def columns() -> list[Tensor]:
    """Queries, positives and N - 1 columns of negatives, each (B, D)."""
    return [vectors(i, B, D) for i in range(1 + N)]


def features(columns: list[Tensor]) -> list[dict]:
    return [{"sentence_embedding": each} for each in columns]


def dots(a: Tensor, b: Tensor) -> float:
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def naive_infonce(columns: list[Tensor], directions: tuple[str, ...], joint: bool) -> float:
    queries, passages, total = columns[0], columns[1:], 0.0
    for i in range(B):
        terms = {
            "query_to_doc": [dots(queries[i], column[j]) for column in passages for j in range(B)],
            "query_to_query": [dots(queries[i], queries[j]) for j in range(B) if j != i],
            "doc_to_query": [dots(queries[j], passages[0][i]) for j in range(B)],
            "doc_to_doc": [dots(c[j], passages[0][i]) for c in passages for j in range(B) if j != i],
        }
        sums = [sum(exp(s / T) for s in terms[direction]) for direction in directions]
        normaliser = log(sum(sums)) if joint else sum(map(log, sums)) / len(sums)
        total -= dots(queries[i], passages[0][i]) / T - normaliser
    return total / B


ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


@pytest.mark.parametrize(
    ("directions", "partition"),
    [
        (ALL[:1], "joint"),
        (ALL[:2], "joint"),
        (ALL[::2], "joint"),
        (ALL, "joint"),
        (ALL[::2], "per_direction"),
    ],
)
def test_infonce_in_every_direction_is_the_sum_over_pairs(
    directions: tuple[str, ...], partition: str
) -> None:
    given = columns()
    loss = dense.MultipleNegativesRankingLoss(
        GIVEN,
        1 / T,
        dot_score,
        directions=directions,
        partition_mode=partition,
    )
    expected = naive_infonce(given, directions, partition == "joint")
    assert float(loss(features(given), None)) == pytest.approx(expected, abs=1e-6)


def test_our_contrast_is_infonce_of_queries_to_passages() -> None:
    given = columns()
    ours = ContrastiveDistillation(GIVEN, "dot", T)
    assert float(ours(features(given))) == pytest.approx(naive_infonce(given, ALL[:1], True), abs=1e-6)


def test_the_positive_is_each_group_s_first_column_for_every_loss() -> None:
    """Labels for P N N P N N where the columns are P P P N N N pull queries to the wrong passage."""
    eye = torch.eye(16, dtype=torch.float64)
    queries = eye[:B]
    given = [queries, queries.clone(), *(eye[4 + B * n : 4 + B * (n + 1)] for n in range(2))]
    for loss in (
        dense.MultipleNegativesRankingLoss(GIVEN, 100, dot_score),
        dense.CachedMultipleNegativesRankingLoss(GIVEN, 100, dot_score, mini_batch_size=2),
        ContrastiveDistillation(GIVEN, "dot", 0.01),
    ):
        right = loss(cacheable(given), None).item()
        wrong = loss(cacheable([given[0], given[2], given[1], given[3]]), None).item()
        assert right < 1e-6 < 1 < wrong
    tokens = [{**each, "task": "document"} for each in multi_features([c[:, None] for c in given])]
    late = multi.MultiVectorMultipleNegativesRankingLoss(GIVEN, scale=100)
    assert float(late(tokens)) < 1e-6
    assert float(ContrastiveDistillation(GIVEN, "maxsim", 0.01)(tokens)) < 1e-6


def cacheable(columns: list[Tensor]) -> list[dict]:
    mask = torch.ones(B, 1, dtype=torch.long)
    return [{"sentence_embedding": each, "input_ids": mask, "attention_mask": mask} for each in columns]


def multi_features(tokens: list[Tensor], masks: list[Tensor] | None = None) -> list[dict]:
    masks = masks or [torch.ones(each.shape[:2], dtype=torch.long) for each in tokens]
    return [
        {"token_embeddings": each, "attention_mask": mask, "input_ids": torch.zeros(each.shape[:2])}
        for each, mask in zip(tokens, masks, strict=True)
    ]


def test_kl_to_a_teacher_is_the_sum_over_candidates() -> None:
    given, teacher = columns(), 5 * vectors(9, B, N)
    student_t, teacher_t = 0.2, 3.0
    expected = 0.0
    for i in range(B):
        scores = [dots(given[0][i], column[i]) / student_t for column in given[1:]]
        of_student = [s - log(sum(map(exp, scores))) for s in scores]
        wanted = [float(t) / teacher_t for t in teacher[i]]
        of_teacher = [t - log(sum(map(exp, wanted))) for t in wanted]
        expected += sum(exp(t) * (t - s) for t, s in zip(of_teacher, of_student, strict=True))
    expected *= student_t**2 / B
    theirs = dense.DistillKLDivLoss(
        GIVEN,
        student_temperature=student_t,
        teacher_temperature=teacher_t,
    )(features(given), teacher)
    scores = torch.stack([(given[0] * column).sum(1) for column in given[1:]], 1)
    ours = distillation(scores, teacher / teacher_t, student_t)
    assert float(theirs) == pytest.approx(expected, abs=1e-6)
    assert float(ours) == pytest.approx(expected, abs=1e-6)


def test_contrast_and_distillation_add_up_with_their_weights() -> None:
    given, teacher = columns(), 5 * vectors(9, B, N)
    both = ContrastiveDistillation(GIVEN, "dot", T, 2.0, contrastive_weight=0.3, distill_weight=0.7)
    scores = torch.stack([(given[0] * column).sum(1) for column in given[1:]], 1) / T
    expected = 0.3 * naive_infonce(given, ALL[:1], True) + 0.7 * float(distillation(scores, teacher / 2))
    assert float(both(features(given), teacher)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("negatives", [1, 2])
def test_margin_mse_is_the_squared_error_of_margins(negatives: int) -> None:
    given, teacher = columns()[: 2 + negatives], vectors(9, B, 1 + negatives)
    errors = [
        (dots(given[0][i], given[1][i]) - dots(given[0][i], c[i]) - float(teacher[i, 0] - teacher[i, n])) ** 2
        for n, c in enumerate(given[2:], 1)
        for i in range(B)
    ]
    expected = sum(errors) / len(errors)
    margin = dense.MarginMSELoss(GIVEN)
    weighted = sparse.SparseMarginMSELoss(GIVEN)
    late = multi.MultiVectorMarginMSELoss(GIVEN)
    assert float(margin(features(given), teacher)) == pytest.approx(expected, abs=1e-6)
    assert float(weighted.compute_loss_from_embeddings(given, teacher)) == pytest.approx(expected, abs=1e-6)
    tokens = multi_features([each[:, None] for each in given])
    assert float(late(tokens, teacher)) == pytest.approx(expected, abs=1e-6)


def test_flops_is_the_squared_mean_activation_of_each_word() -> None:
    weights = vectors(1, B, D).abs()
    expected = sum((sum(abs(float(weights[b, j])) for b in range(B)) / B) ** 2 for j in range(D))
    loss = sparse.FlopsLoss(GIVEN)
    assert float(loss.compute_loss_from_embeddings(weights)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_splade_pooling_is_log1p_relu_over_real_tokens(pooling: Any, chunk: int | None) -> None:
    logits = 3 * torch.randn(B, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 1, 1, 1]])
    pool = SpladePooling(pooling, chunk_size=chunk)
    out = pool({"token_embeddings": logits.clone(), "attention_mask": mask})["sentence_embedding"]
    reduce = {"max": max, "sum": sum}[pooling]
    for b in range(B):
        for word in range(7):
            values = [log(1 + max(0.0, float(logits[b, t, word]))) for t in range(5) if mask[b, t]]
            assert float(out[b, word]) == pytest.approx(reduce(values), abs=1e-6)


@pytest.mark.parametrize("occurrence", ["max", "first"])
def test_token_weights_go_to_the_words_of_the_text(occurrence: str) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 8, (B, 9), generator=generator)
    impacts = torch.rand(B, 9, generator=generator, dtype=torch.float64)
    mask = torch.ones(B, 9, dtype=torch.long)
    mask[1, 5:] = mask[2, :3] = 0
    out = pool_impacts(impacts, ids, mask, 10, [0, 1], occurrence)
    for b in range(B):
        for word in range(10):
            found = [float(impacts[b, t]) for t in range(9) if mask[b, t] and int(ids[b, t]) == word]
            wanted = 0.0 if word in (0, 1) or not found else max(found) if occurrence == "max" else found[0]
            assert float(out[b, word]) == wanted


def test_the_gradient_of_a_word_goes_to_the_token_that_won() -> None:
    impacts = torch.tensor([[0.2, 0.9, 0.4]], requires_grad=True)
    pool_impacts(impacts, torch.tensor([[3, 3, 2]]), torch.ones(1, 3), 5, [])[0, 3].backward()
    assert impacts.grad is not None and impacts.grad.tolist() == [[0.0, 1.0, 0.0]]


def ragged() -> tuple[list[Tensor], list[Tensor]]:
    """Queries and two columns of passages, of different lengths, with padding of large values."""
    tokens = [vectors(1, B, 3, D), vectors(2, B, 5, D), vectors(3, B, 4, D)]
    masks = [torch.ones(each.shape[:2], dtype=torch.long) for each in tokens]
    masks[0][0, 2:] = masks[1][1, 2:] = masks[1][3, 1:] = masks[2][2, 1:3] = 0
    for each, mask in zip(tokens, masks, strict=True):
        each[mask == 0] = 50.0
    return tokens, masks


def test_maxsim_is_the_sum_of_best_matches_of_what_the_masks_leave() -> None:
    tokens, masks = ragged()
    scores = maxsim_scores(GIVEN, multi_features(tokens, masks))
    for i in range(B):
        for j in range(B):
            for n, (passages, mask) in enumerate(zip(tokens[1:], masks[1:], strict=True)):
                expected = sum(
                    max(dots(tokens[0][i, q], passages[j, p]) for p in range(len(mask[j])) if mask[j, p])
                    for q in range(3)
                    if masks[0][i, q]
                )
                theirs = maxsim(tokens[0], passages, masks[0], mask)[i, j]
                assert float(scores[i, j, n]) == pytest.approx(expected, abs=1e-6)
                assert float(theirs) == pytest.approx(expected, abs=1e-6)


def test_padding_of_zeros_is_no_floor_under_maxsim() -> None:
    """If every token of a passage points away from the query, padding with zeros must not win."""
    queries, passages = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[-0.6, 0.8], [0.0, 0.0]]])
    mask = [torch.ones(1, 1), torch.tensor([[1, 0]])]
    [[[score]]] = maxsim_scores(GIVEN, multi_features([queries, passages], mask)).tolist()
    assert score == pytest.approx(-0.6)
