"""One impact a token: the learned sparse heads of uniCOIL and DeepImpact, as a sentence-transformers module.

uniCOIL (Lin and Ma 2021): w_t = ReLU(W h_t), a text's weight of a word piece is the largest of its
occurrences. DeepImpact (Mallia et al. 2021): an MLP, read at the first occurrence of each piece of the
(expanded) passage; its query is binary. Both weigh what the text holds: no other piece is ever non-zero.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from sentence_transformers.base.modules import Module
from torch import Tensor, nn


class WeightedModule(Module):
    """A module with weights: what it is made from stands in `config_keys`."""

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> Self:
        hub = ("token", "cache_folder", "revision", "local_files_only")
        of = {"subfolder": subfolder, **{key: kwargs[key] for key in hub if key in kwargs}}
        module = cls(**cls.load_config(model_name_or_path, **of))
        cls.load_torch_weights(model_name_or_path, model=module, **of)
        return module


class TokenWeights(WeightedModule):
    """Token vectors in, a sparse vector over the vocabulary out.

    hidden_size of the token vectors; vocabulary_size of the tokenizer; layers of the head: 1 is linear
    (uniCOIL), more are a ReLU MLP of the same width (DeepImpact has 2). occurrence: "max" over those of
    a piece, or the "first". Put behind a Transformer; the pieces that the tokenizer calls special, and
    padding, weigh 0.
    """

    config_keys: ClassVar[list[str]] = ["hidden_size", "vocabulary_size", "layers", "occurrence"]

    def __init__(
        self,
        hidden_size: int,
        vocabulary_size: int,
        layers: int = 1,
        occurrence: Literal["max", "first"] = "max",
    ) -> None:
        super().__init__()
        if layers < 1 or occurrence not in ("max", "first"):
            raise ValueError(f"layers = {layers}, occurrence = {occurrence!r}: >= 1, and max or first")
        self.hidden_size, self.vocabulary_size = hidden_size, vocabulary_size
        self.layers, self.occurrence = layers, occurrence
        self.pooling_mode = f"{occurrence} of {layers}"  # what an EncodingSpec says of it
        inner = [each for _ in range(layers - 1) for each in (nn.Linear(hidden_size, hidden_size), nn.ReLU())]
        last = nn.Linear(hidden_size, 1)
        nn.init.ones_(last.bias)  # every token starts alive: a ReLU that starts at 0 may never learn
        self.head = nn.Sequential(*inner, last)
        self.special_ids: list[int] = []

    def on_model_ready(self, model: Any) -> None:
        """Learn which pieces are special from the model's tokenizer; sentence-transformers calls it."""
        self.special_ids = sorted(model.tokenizer.all_special_ids)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sets `sentence_embedding` (B, V) from `token_embeddings` (B, T, H), ids and mask (B, T)."""
        if "cu_seq_lens_q" in features:
            from sentence_transformers.util.tensor import repad_flattened_features

            features = repad_flattened_features(features)
        impacts = torch.relu(self.head(features["token_embeddings"])).squeeze(-1)
        ids, mask = features["input_ids"], features["attention_mask"]
        features["sentence_embedding"] = pool_impacts(
            impacts, ids, mask, self.vocabulary_size, self.special_ids, self.occurrence
        )
        return features

    def get_embedding_dimension(self) -> int:
        return self.vocabulary_size


def pool_impacts(
    impacts: Tensor,
    ids: Tensor,
    mask: Tensor,
    vocabulary_size: int,
    special_ids: list[int],
    occurrence: str = "max",
) -> Tensor:
    """The weight of each piece of a text: the largest, or the first, of its impacts >= 0.

    impacts, ids and mask (B, T) -> (B, V); 0 for what the text does not hold, special ids and padding.
    """
    special = torch.tensor(special_ids, dtype=ids.dtype, device=ids.device)
    kept = mask.bool() & ~torch.isin(ids, special)
    if occurrence == "first":
        same = (ids[:, :, None] == ids[:, None, :]) & kept[:, None, :]  # (B, T, T)
        kept = kept & ~same.tril(-1).any(-1)
    weights = impacts.new_zeros(len(ids), vocabulary_size)
    return weights.scatter_reduce(1, ids, impacts * kept, "amax")
