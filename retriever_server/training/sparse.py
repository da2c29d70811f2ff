"""Builders of learned sparse models that weigh a text's own words, and the loss of SPLADE, for recipes."""

from __future__ import annotations

from typing import Any, Literal

from retriever_server.training.models import Base, _assemble, _transformer


def unicoil(base: Base, max_tokens: int | None = None, dtype: str = "float32") -> Any:
    """uniCOIL: one weight a token by a linear layer, for queries and passages (Lin and Ma 2021).

    Passages may be expanded before (`expansion.py`): nothing that is not in a text gets a weight.
    """
    from sentence_transformers import SparseEncoder

    return _assemble(SparseEncoder, _weighed(base, max_tokens, dtype), "", "", "dot")


def deepimpact(base: Base, layers: int = 2, max_tokens: int | None = None, dtype: str = "float32") -> Any:
    """DeepImpact: an MLP's weight of each piece of the passage at its first occurrence (Mallia et al. 2021).

    A query is the set of its pieces, each of weight 1, without a transformer. The paper's terms are
    words, ours are the tokenizer's word pieces.
    """
    import torch
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.modules import Router, SparseStaticEmbedding

    weighed = _weighed(base, max_tokens, dtype, layers=layers, occurrence="first")
    tokenizer = weighed[0].tokenizer
    ones = torch.ones(len(tokenizer))
    ones[tokenizer.all_special_ids] = 0
    query = SparseStaticEmbedding(tokenizer=tokenizer, weight=ones, frozen=True)
    router = Router.for_query_document(query_modules=[query], document_modules=weighed)
    return _assemble(SparseEncoder, [router], "", "", "dot")


def _weighed(base: Base, max_tokens: int | None, dtype: str, **options: Any) -> list[Any]:
    from retriever_server.encoders.token_weights import TokenWeights

    transformer = _transformer(base, max_tokens, dtype)
    size, vocabulary = transformer.get_embedding_dimension(), len(transformer.tokenizer)
    return [transformer, TokenWeights(size, vocabulary, **options)]


def splade_loss(
    model: Any,
    objective: Literal["contrastive", "margin_mse", "kl"] = "contrastive",
    passage_weight: float = 3e-5,
    query_weight: float | None = 5e-5,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    contrastive_weight: float = 0.0,
    mini_batch_size: int | None = None,
    gather_across_devices: bool = False,
) -> Any:
    """SPLADE's loss: an objective plus FLOPS of queries and passages, sum_j (mean_b |w_bj|)^2 each.

    The weights of FLOPS rise as the square of the step over the first third of training
    (sentence-transformers' callback). query_weight: None for inference-free queries. objective:
    contrastive within the batch; margin_mse of teacher scores (SPLADE++ ED); kl to them, with
    contrastive_weight x the contrast (SPLADE-v3). mini_batch_size: GradCache. The rest as in
    `ContrastiveDistillation`.
    """
    from sentence_transformers.sparse_encoder import losses

    from retriever_server.training.distill import ContrastiveDistillation

    if objective == "margin_mse":
        inner: Any = losses.SparseMarginMSELoss(model)
    else:
        alone = objective == "contrastive"
        inner = ContrastiveDistillation(
            model, "dot", temperature, teacher_temperature,
            contrastive_weight=1.0 if alone else contrastive_weight, distill_weight=0.0 if alone else 1.0,
            gather_across_devices=gather_across_devices,
        )  # fmt: skip
    weights = {"document_regularizer_weight": passage_weight, "query_regularizer_weight": query_weight}
    if mini_batch_size is not None:
        return losses.CachedSpladeLoss(model, inner, mini_batch_size=mini_batch_size, **weights)
    return losses.SpladeLoss(model, inner, **weights)
