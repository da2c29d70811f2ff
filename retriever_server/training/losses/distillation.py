"""Contrast within the batch and a teacher's scores in one loss, for dense, sparse and multi-vector models.

sentence-transformers has each alone; with both (BGE, SPLADE-v3, ColBERTv2) its losses would encode twice.
Both terms see only a matrix of scores, so that one class serves all kinds of vectors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.base.losses.merged_forward import embed_columns, embed_columns_padded
from sentence_transformers.util import all_gather, all_gather_with_grad, cos_sim, dot_score, get_rank
from torch import Tensor, nn

from data.errors import ConfigError

_SIMILARITIES = {"cosine": cos_sim, "dot": dot_score}


def contrastive(scores: Tensor, first: int = 0) -> Tensor:
    """InfoNCE: minus the mean log-softmax of each query's positive among all passages of the batch.

    scores (B, G, N), already over the temperature: query i against passage n of group j; n = 0 is the
    positive of query j. Query i belongs to group first + i (its place when groups are gathered).
    """
    own = torch.arange(len(scores), device=scores.device) + first
    return F.cross_entropy(scores.flatten(1), own * scores.shape[2])


def distillation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(teacher) || softmax(student / T)) x T^2, mean over queries (Hinton et al. 2015).

    student and teacher (B, N): over the passages of the query's own group. The teacher's temperature is
    its own affair: divide before.
    """
    log_student = F.log_softmax(student / temperature, dim=1)
    target = F.softmax(teacher.detach(), dim=1)
    return F.kl_div(log_student, target, reduction="batchmean") * temperature**2


def own_group(scores: Tensor, first: int = 0) -> Tensor:
    """Each query's scores of its own positive and negatives.   (B, G, N) -> (B, N)"""
    rows = torch.arange(len(scores), device=scores.device)
    return scores[rows, rows + first]


class GradCached(CachedLossMixin, nn.Module):
    """A loss that gives `compute_loss_from_embeddings`, by GradCache where it has a mini_batch_size.

    gather_across_devices: the texts of all processes are negatives.
    """

    compute_loss_from_embeddings: Any

    def __init__(self, model: Any, mini_batch_size: int | None, gather_across_devices: bool) -> None:
        super().__init__()
        self.model, self.gather_across_devices = model, gather_across_devices
        self.mini_batch_size = mini_batch_size  # type: ignore[assignment]
        self.uses_gradient_cache = mini_batch_size is not None

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """The loss of a batch, a scalar."""
        features = [dict(each) for each in sentence_features]
        if self.uses_gradient_cache:
            return self.forward_cached(features, labels)
        return self.compute_loss_from_embeddings(embed_columns(self.model, features), labels)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Compute the loss of the vectors of all mini-batches; GradCache calls it."""
        loss = self.compute_loss_from_embeddings([torch.cat(each) for each in reps], labels)
        if not with_backward:
            return loss
        loss.backward()
        return loss.detach()


class ContrastiveDistillation(GradCached):
    """contrastive_weight x InfoNCE + distill_weight x KL to the teacher's scores of the own group.

    Columns (anchor, positive, negative_1..n, label (n + 1 teacher scores)); without labels the first
    term alone. temperature divides the student's scores in both terms, as BGE does; teacher_temperature
    the labels. similarity: cosine or dot (of dense or sparse vectors), maxsim (of a MultiVectorEncoder).
    mini_batch_size: encode so many texts at once and keep gradients of vectors only (GradCache; not with
    maxsim). gather_across_devices: the passages of all processes are negatives.
    May stand inside SpladeLoss, which adds FLOPS.
    """

    def __init__(
        self,
        model: Any,
        similarity: str = "cosine",
        temperature: float = 0.02,
        teacher_temperature: float = 1.0,
        contrastive_weight: float = 1.0,
        distill_weight: float = 1.0,
        mini_batch_size: int | None = None,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__(model, mini_batch_size, gather_across_devices)
        allowed = (*_SIMILARITIES, "maxsim")
        if similarity not in allowed:
            raise ValueError(f"similarity {similarity!r}: must be one of {', '.join(allowed)}")
        if similarity == "maxsim" and mini_batch_size:
            raise ValueError("similarity maxsim: takes no mini_batch_size")
        if temperature <= 0 or teacher_temperature <= 0:
            raise ValueError(f"temperatures {temperature}, {teacher_temperature}: must be > 0")
        self.similarity = similarity
        self.temperature, self.teacher_temperature = temperature, teacher_temperature
        self.contrastive_weight, self.distill_weight = contrastive_weight, distill_weight

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        if self.similarity != "maxsim":
            return super().forward(sentence_features, labels)
        features = [dict(each) for each in sentence_features]
        scores = maxsim_scores(self.model, features, self.gather_across_devices)
        first = get_rank() * len(scores) if self.gather_across_devices else 0
        return self._of_scores(scores, labels, first)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of vectors, one tensor (B, D) a column."""
        queries, passages = embeddings[0], embeddings[1:]
        first = 0
        if self.gather_across_devices:
            passages = [all_gather_with_grad(each) for each in passages]
            first = get_rank() * len(queries)
        of = _SIMILARITIES[self.similarity]
        scores = torch.stack([of(queries, each) for each in passages], dim=2)
        return self._of_scores(scores, labels, first)

    def _of_scores(self, scores: Tensor, labels: Tensor | None, first: int = 0) -> Tensor:
        if labels is None and not self.contrastive_weight:
            raise ConfigError("loss: contrastive_weight = 0: nothing to learn without labels: true in train")
        scores = scores / self.temperature
        loss = self.contrastive_weight * contrastive(scores, first)
        if labels is None or self.distill_weight == 0:
            return loss
        teacher = labels / self.teacher_temperature
        return loss + self.distill_weight * distillation(own_group(scores, first), teacher)


class WeightedInfoNCE(ContrastiveDistillation):
    """InfoNCE with weights of examples (LRAT, 2604.04949) and of negatives (ITER, 2608.27912).

    -w_i log(e^{s_i+} / sum over the passages p of the batch of v_p e^{s_ip}), s over the temperature: a
    negative adds log v to its logit, for all queries and whichever process it is in; v of a positive is 1.
    Columns (anchor, positive, negative_1..n, label (B, 1 + n): w, and v of each negative): `weights: true`.
    """

    def __init__(
        self,
        model: Any,
        similarity: str = "cosine",
        temperature: float = 0.02,
        mini_batch_size: int | None = None,
        gather_across_devices: bool = False,
    ) -> None:
        rest: Any = {"mini_batch_size": mini_batch_size, "gather_across_devices": gather_across_devices}
        super().__init__(model, similarity, temperature, **rest)

    def _of_scores(self, scores: Tensor, labels: Tensor | None, first: int = 0) -> Tensor:
        if labels is None:
            raise ConfigError("loss: WeightedInfoNCE reads weights of examples: say weights: true in train")
        offsets = F.pad(labels[:, 1:].log(), (1, 0))  # (B, N)
        offsets = all_gather(offsets) if self.gather_across_devices else offsets
        logits = (scores / self.temperature + offsets).flatten(1)
        own = (torch.arange(len(scores), device=scores.device) + first) * scores.shape[2]
        return (labels[:, 0] * F.cross_entropy(logits, own, reduction="none")).mean()


def maxsim_scores(encoder: Any, features: list[dict[str, Any]], gather: bool = False) -> Tensor:
    """MaxSim of every query with every passage of the batch; what the masks leave out counts nowhere.

    features of the columns (anchor, positive, negative_1..) -> (B, G, N); G = B, or B of every process.
    """
    from sentence_transformers.multi_vector_encoder.scoring import colbert_scores
    from sentence_transformers.util import all_gather_padded
    from sentence_transformers.util.tensor import stack_padded_token_embeddings

    queries = encoder(features[0], task="query")
    columns = embed_columns_padded(encoder, features[1:], task_default="document")
    if gather:
        gathered = [all_gather_padded(e, m, with_grad=True) for e, m in zip(*columns, strict=True)]
        columns = tuple(map(list, zip(*gathered, strict=True)))
    passages, mask = stack_padded_token_embeddings(*columns)
    of = queries["token_embeddings"]
    scores = colbert_scores(of, passages, queries["attention_mask"].bool(), mask)  # (B, G * N)
    return scores.view(len(of), len(passages), -1)
