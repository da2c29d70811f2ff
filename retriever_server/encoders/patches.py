"""The mask of a vision tower's patches: what late interaction scores where there are no tokens to mask."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from sentence_transformers.base.modules import Module


class PatchMask(Module):
    """Every patch of an image counts: all have the same number, so that nothing is padded.

    Put behind a vision tower, whose images come without `attention_mask`; `skip` leaves out so many first
    vectors (1: the [CLS] of a ViT).
    """

    config_keys: ClassVar[list[str]] = ["skip"]

    def __init__(self, skip: int = 0) -> None:
        super().__init__()
        self.skip = skip
        self.pooling_mode = f"patches from {skip}"  # what an EncodingSpec says of it

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Sets `attention_mask` (B, T) for `token_embeddings` (B, T, H)."""
        vectors = features["token_embeddings"]
        mask = torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
        mask[:, : self.skip] = False
        return {**features, "attention_mask": mask}

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        self.save_config(output_path)
