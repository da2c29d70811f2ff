"""Qwen3-Embedding's InfoNCE against a double loop, sentence-transformers, and itself in pieces."""

import math

import pytest
import torch
from sentence_transformers import losses
from torch.nn.functional import cosine_similarity

from retriever_server.training.builders.dense import decoder
from retriever_server.training.losses.info_nce import DIRECTIONS, Qwen3InfoNCE, qwen3_info_nce, text_keys
from tests.retriever_server.training.decoder_models import tiny_decoder

T = 0.05


def columns(count=6, negatives=2, size=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, size, generator=generator) + 0.4 for _ in range(2 + negatives)]


def keys(*rows):
    return [torch.tensor(row) for row in rows]


def naive(columns, texts, temperature, margin, directions):
    """The formula of the paper, pair by pair."""
    queries, positives = columns[:2]
    total = 0.0
    for i, query in enumerate(queries):

        def s(a, b):
            return float(cosine_similarity(a, b, dim=0))

        positive = s(query, positives[i])
        golds = {int(texts[1][j]) for j in range(len(queries)) if texts[0][j] == texts[0][i]}
        z = math.exp(positive / temperature)
        for column, passages in enumerate(columns[1:], start=1):
            for j, passage in enumerate(passages):
                repeated = int(texts[column][j]) in golds
                if not (column == 1 and i == j):
                    value = s(query, passage)
                    masked = margin is not None and (value > positive + margin or repeated)
                    z += 0 if masked else math.exp(value / temperature)
                if i != j and "doc_to_doc" in directions:
                    value = s(positives[i], passage)
                    masked = margin is not None and (value > positive + margin or repeated)
                    z += 0 if masked else math.exp(value / temperature)
        for j, other in enumerate(queries):
            if i != j and "query_to_query" in directions:
                value = s(query, other)
                same = texts[0][i] == texts[0][j] or int(texts[1][j]) in golds
                masked = margin is not None and (value > positive + margin or same)
                z += 0 if masked else math.exp(value / temperature)
        total -= math.log(math.exp(positive / temperature) / z)
    return total / len(queries)


DISTINCT = keys(*(range(i * 10, i * 10 + 6) for i in range(4)))
REPEATED = keys([0, 1, 2, 0, 4, 5], [10, 11, 12, 13, 12, 15], [20, 11, 22, 23, 24, 25], [30] * 6)


@pytest.mark.parametrize("margin", [None, 0.0, 0.1])
@pytest.mark.parametrize("directions", [DIRECTIONS, DIRECTIONS[:1], DIRECTIONS[:2]])
@pytest.mark.parametrize("texts", [DISTINCT, REPEATED])
def test_the_loss_is_that_of_the_formula(margin, directions, texts):
    of = columns()
    loss = qwen3_info_nce(of, texts, slice(0, 6), T, margin, directions)
    assert float(loss) == pytest.approx(naive(of, texts, T, margin, directions), abs=1e-5)


def test_another_positive_of_a_repeated_query_is_no_negative():
    """Three rows of one query: its loss is that of the row alone, but for the last row's own passage."""
    of = columns(count=4, negatives=0)
    of[0][1] = of[0][2] = of[0][0]
    texts = keys([7, 7, 7, 8], [10, 11, 12, 13])
    loss = qwen3_info_nce(of, texts, slice(0, 1), T, 10.0, DIRECTIONS[:1])
    own, other = (float(cosine_similarity(of[0][0], of[1][j], dim=0)) / T for j in (0, 3))
    assert float(loss) == pytest.approx(math.log(1 + math.exp(other - own)), abs=1e-5)


@pytest.mark.parametrize("directions", [DIRECTIONS, DIRECTIONS[:1], DIRECTIONS[:2], DIRECTIONS[::2]])
def test_without_a_margin_it_is_the_loss_of_sentence_transformers(directions):
    theirs = losses.MultipleNegativesRankingLoss(None, scale=1 / T, directions=directions)
    of = columns()
    expected = theirs.compute_loss_from_embeddings(of, None)
    assert float(qwen3_info_nce(of, DISTINCT, slice(0, 6), T, None, directions)) == pytest.approx(
        float(expected), abs=1e-6
    )


def test_a_negative_above_the_margin_is_left_out_and_none_below():
    query, positive = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])  # cosine .6
    for cosine, left_out in ((0.71, True), (0.69, False)):
        hard = torch.tensor([[cosine, math.sqrt(1 - cosine**2)]])
        loss = qwen3_info_nce([query, positive, hard], keys([0], [1], [2]), slice(0, 1), T, 0.1, DIRECTIONS)
        assert (float(loss) == pytest.approx(0)) == left_out


def test_the_mask_lets_no_gradient_through():
    of = [each.requires_grad_() for each in columns(negatives=1)]
    texts = keys(range(6), [10, 11, 12, 13, 14, 15], [10, 21, 22, 23, 24, 25])
    qwen3_info_nce(of, texts, slice(0, 6), T, 0.1, DIRECTIONS[:1])[None].backward()
    alone = [each.detach().clone().requires_grad_() for each in of]
    one = [alone[0], alone[1], alone[2]]
    first = qwen3_info_nce(one, texts, slice(0, 1), T, 0.1, DIRECTIONS[:1])
    (of_negative,) = torch.autograd.grad(first, [alone[2]])
    assert of_negative[0].abs().max() == 0  # query 0's hard negative is its positive


def test_parts_of_a_batch_add_up_to_the_whole():
    """The sum over what each process computes of a gathered batch."""
    of = columns()
    whole = qwen3_info_nce(of, REPEATED, slice(0, 6), T, 0.1, DIRECTIONS)
    parts = [qwen3_info_nce(of, REPEATED, slice(i, i + 3), T, 0.1, DIRECTIONS) for i in (0, 3)]
    assert float(sum(parts) / 2) == pytest.approx(float(whole), abs=1e-6)


def test_keys_are_those_of_the_tokens_wherever_the_padding_is():
    left = text_keys(
        torch.tensor([[0, 0, 5, 6, 7], [1, 2, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    )
    right = text_keys(torch.tensor([[5, 6, 7, 9], [7, 6, 5, 9]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]]))
    assert left[0] == right[0]
    assert len({*left.tolist(), *right.tolist()}) == 3


def test_gradient_caching_changes_nothing(tmp_path):
    model = decoder(tiny_decoder(tmp_path), max_tokens=32)
    texts = [["a", "b c", "river"], ["one", "a longer text", "one"], ["two", "x", "y z"]]

    def gradients(mini_batch_size):
        model.zero_grad()
        loss = Qwen3InfoNCE(model, T, mini_batch_size=mini_batch_size)
        value = loss([model.preprocess(each) for each in texts])
        value.backward()
        return value.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    (value, of), (cached, of_cached) = gradients(None), gradients(2)
    assert value == pytest.approx(cached, abs=1e-6)
    assert torch.allclose(of, of_cached, rtol=1e-4, atol=1e-5)


def test_wrong_settings_are_refused():
    for wrong in ({"temperature": 0}, {"margin": -1}, {"directions": ("doc_to_doc",)}):
        with pytest.raises(ValueError, match=r"must be|query_to_doc"):
            Qwen3InfoNCE(None, **wrong)
