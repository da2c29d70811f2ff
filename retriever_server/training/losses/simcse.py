"""Unsupervised SimCSE: texts alone, each its own positive (Gao et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn

from data.errors import ConfigError


class SimCSE(nn.Module):
    """Unsupervised SimCSE: each text encoded twice, with other dropout, among the others (Gao et al. 2021).

    Of the texts in the first column. The model must have dropout: `decoder(dropout=0.3)`.
    """

    def __init__(self, model: Any, temperature: float = 0.05, gather_across_devices: bool = False) -> None:
        super().__init__()
        dropout = getattr(model.transformers_model.config.get_text_config(), "attention_dropout", 0.0)
        if not dropout and not any(isinstance(each, nn.Dropout) and each.p for each in model.modules()):
            raise ConfigError("SimCSE: the model has no dropout, so that both vectors of a text are the same")
        self.model, self.temperature = model, temperature
        self.of_pairs = MultipleNegativesRankingLoss(
            model, scale=1 / temperature, gather_across_devices=gather_across_devices
        )

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        features = next(iter(sentence_features))
        twice = [self.model(dict(features))["sentence_embedding"] for _ in range(2)]
        return self.of_pairs.compute_loss_from_embeddings(twice, labels)  # type: ignore[arg-type]
