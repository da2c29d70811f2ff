"""SPLADE's loss: an objective, and FLOPS of the vectors (Formal et al. 2021)."""

from __future__ import annotations

from typing import Any, Literal

from sentence_transformers.sparse_encoder import losses

from retriever_server.training.losses.distillation import ContrastiveDistillation


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
