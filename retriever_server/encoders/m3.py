"""The three heads of BGE-M3 on one trunk, and the way from there to three encoders (Chen et al. 2024)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retriever_server.encoders.token_weights import TokenWeights, WeightedModule


class M3Heads(WeightedModule):
    """Token vectors in; `sentence_embedding` (B, H) of [CLS], length 1; `token_weights` (B, V); and a
    vector a token of length 1, `token_embeddings` (B, T, D), of those that `vector_mask` (B, T) marks: all
    but [CLS] and padding.
    """

    config_keys: ClassVar[list[str]] = ["hidden_size", "vocabulary_size", "dimension"]

    def __init__(self, hidden_size: int, vocabulary_size: int, dimension: int = 128) -> None:
        super().__init__()
        self.hidden_size, self.vocabulary_size, self.dimension = hidden_size, vocabulary_size, dimension
        self.weigh = TokenWeights(hidden_size, vocabulary_size)
        self.project = nn.Linear(hidden_size, dimension, bias=False)

    def on_model_ready(self, model: Any) -> None:
        """Learn which pieces are special; sentence-transformers calls it."""
        self.weigh.on_model_ready(model)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        tokens, mask = features["token_embeddings"], features["attention_mask"].bool()
        features["token_weights"] = self.weigh(dict(features))["sentence_embedding"]
        features["sentence_embedding"] = F.normalize(tokens[:, 0], dim=-1)
        features["token_embeddings"] = F.normalize(self.project(tokens), dim=-1)
        features["vector_mask"] = mask & (torch.arange(mask.shape[1], device=mask.device) > 0)
        return features

    def get_embedding_dimension(self) -> int:
        return self.hidden_size

    def parts(self, model: Any) -> dict[str, Any]:
        """The three encoders in `model`, of which this is the last module: dense, sparse and multi.

        They load in plain sentence-transformers (sparse with trust_remote_code, for its module is ours).
        """
        from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
        from sentence_transformers.base.modules import Dense, Normalize
        from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
        from sentence_transformers.sentence_transformer.modules import Pooling

        project = Dense(
            self.hidden_size, self.dimension, bias=False, activation_function=nn.Identity(),
            module_input_name="token_embeddings",
        )  # fmt: skip
        project.linear = self.project
        skipped = MultiVectorMask([model.tokenizer.cls_token], skiplist_tasks=["query", "document"])
        late: list[Any] = [project, skipped, Normalize("token_embeddings")]
        alike: dict[str, Any] = {"prompts": dict(model.prompts), "device": str(model.device)}
        pooled: list[Any] = [Pooling(self.hidden_size, "cls"), Normalize()]
        return {
            "dense": SentenceTransformer(modules=[model[0], *pooled], similarity_fn_name="cosine", **alike),
            "sparse": SparseEncoder(modules=[model[0], self.weigh], similarity_fn_name="dot", **alike),
            "multi": MultiVectorEncoder(modules=[model[0], *late], **alike),
        }
