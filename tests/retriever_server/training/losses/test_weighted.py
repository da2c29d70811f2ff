"""The weighted InfoNCE against a plain loop; with weights of 1 it is InfoNCE."""

from math import exp, log

import pytest
import torch

from data.errors import ConfigError
from retriever_server.training.losses.distillation import ContrastiveDistillation, WeightedInfoNCE
from tests.retriever_server.training.losses.test_formulas import (
    GIVEN,
    B,
    N,
    T,
    columns,
    dots,
    features,
    vectors,
)


@pytest.mark.parametrize("similarity", ["dot", "maxsim"])
def test_weights_multiply_examples_and_the_odds_of_negatives_for_every_query(similarity: str) -> None:
    given = columns()
    weights = vectors(9, B, N).abs() + 0.1
    total = 0.0
    for i in range(B):
        terms = [
            (1.0 if n == 0 else float(weights[j, n])) * exp(dots(given[0][i], given[1 + n][j]) / T)
            for n in range(N)
            for j in range(B)
        ]
        total -= float(weights[i, 0]) * log(exp(dots(given[0][i], given[1][i]) / T) / sum(terms)) / B
    loss = WeightedInfoNCE(GIVEN, "dot", T)
    tokens = [{"token_embeddings": each[:, None], "attention_mask": torch.ones(B, 1)} for each in given]
    if similarity == "maxsim":
        loss, found = WeightedInfoNCE(GIVEN, "maxsim", T), tokens
    else:
        found = features(given)
    assert loss(found, weights).item() == pytest.approx(total, rel=1e-5)
    ones = torch.ones(B, N, dtype=torch.float64)
    plain = ContrastiveDistillation(GIVEN, similarity, T)(found)
    assert loss(found, ones).item() == pytest.approx(plain.item(), rel=1e-7)
    with pytest.raises(ConfigError, match="weights: true"):
        loss(found)
