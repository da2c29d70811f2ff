"""BGE-M3's loss: three kinds of scores, taught by their ensemble (Chen et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retriever_server.training.losses.distillation import contrastive


class M3Loss(nn.Module):
    """InfoNCE of each kind of score and of their ensemble, and each kind taught by the ensemble.

    ensemble = dense + sparse_share x sparse + multi, all over the temperature; multi is MaxSim's mean over
    the query's tokens. contrast = (dense + ensemble + sparse_weight x sparse + multi) / 4; teaching, the
    cross-entropy to softmax(ensemble) over all passages of the batch, which is KL but for a constant:
    (dense + sparse_weight x sparse + multi) / 3; the loss is their mean, or without self_distillation
    the contrast alone. Columns (anchor, positive, negative_1..n).
    """

    def __init__(
        self,
        model: Any,
        temperature: float = 0.02,
        sparse_share: float = 0.3,
        sparse_weight: float = 0.1,
        self_distillation: bool = True,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature {temperature}: must be > 0")
        self.model, self.temperature = model, temperature
        self.sparse_share, self.sparse_weight = sparse_share, sparse_weight
        self.self_distillation = self_distillation

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        queries, *passages = [self.model(dict(features)) for features in sentence_features]
        return self.of_scores(*self.scores(queries, passages))

    def scores(self, queries: dict, passages: list[dict]) -> tuple[Tensor, Tensor, Tensor]:
        """Dense, sparse and multi-vector scores of each query with each passage.   3 x (B, B, N)"""
        columns = [
            (
                queries["sentence_embedding"] @ column["sentence_embedding"].T,
                queries["token_weights"] @ column["token_weights"].T,
                _mean_maxsim(queries, column),
            )
            for column in passages
        ]
        dense, sparse, multi = (
            torch.stack(kind, 2) / self.temperature for kind in zip(*columns, strict=True)
        )
        return dense, sparse, multi

    def of_scores(self, dense: Tensor, sparse: Tensor, multi: Tensor) -> Tensor:
        """The loss of scores (B, B, N) that are over the temperature."""
        ensemble = dense + self.sparse_share * sparse + multi
        weights = (1.0, self.sparse_weight, 1.0)
        kinds = (dense, sparse, multi)
        contrast = sum(w * contrastive(kind) for w, kind in zip(weights, kinds, strict=True))
        loss = (contrast + contrastive(ensemble)) / 4
        if not self.self_distillation:
            return loss
        target = ensemble.detach().flatten(1).softmax(1)
        taught = [F.cross_entropy(kind.flatten(1), target) for kind in kinds]
        return (loss + sum(w * each for w, each in zip(weights, taught, strict=True)) / 3) / 2


def _mean_maxsim(queries: dict, passages: dict) -> Tensor:
    from sentence_transformers.util import maxsim

    of = [(each["token_embeddings"], each["vector_mask"]) for each in (queries, passages)]
    (a, a_mask), (b, b_mask) = of
    return maxsim(a, b, a_mask, b_mask, length_normalize=True)
