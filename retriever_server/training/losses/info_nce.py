"""InfoNCE as Qwen3-Embedding trains by it: more kinds of negatives, without those that may be positives.

sentence-transformers has the directions (MultipleNegativesRankingLoss), and GIST filters by a guide model;
a margin over the model's own score of the positive, and repeated texts by their tokens, it does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers.util import all_gather, all_gather_with_grad, get_rank
from torch import Tensor
from torch.nn.functional import normalize

from retriever_server.training.losses.distillation import GradCached

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_doc")
"""As sentence-transformers names them; the first is always in."""


class Qwen3InfoNCE(GradCached):
    """-log of e^{s(q, d+)/T} over its sum with every negative; cosine similarities (Zhang et al. 2025).

    Negatives of query i: all other passages of the batch, its own hard ones among them; the other queries
    (query_to_query); and for its positive the passages of other queries (doc_to_doc). One is left out
    where its similarity is above s(q_i, d_i+) + margin, or where it is, or belongs to, the same text, or a
    positive that the same query has elsewhere in the batch: it might be a positive that nobody marked.
    margin None: nothing is left out, as in MultipleNegativesRankingLoss with these directions.

    Columns (anchor, positive, negative_1..n). mini_batch_size: encode so many texts at once and keep the
    gradients of vectors only (GradCache). gather_across_devices: texts of all processes are negatives.
    """

    def __init__(
        self,
        model: Any,
        temperature: float = 0.02,
        margin: float | None = 0.1,
        directions: tuple[str, ...] = DIRECTIONS,
        mini_batch_size: int | None = None,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__(model, mini_batch_size, gather_across_devices)
        if temperature <= 0 or (margin is not None and margin < 0):
            raise ValueError(f"temperature = {temperature}, margin = {margin}: must be > 0 and >= 0")
        if "query_to_doc" not in directions or not set(directions) <= set(DIRECTIONS):
            raise ValueError(f"directions {directions}: query_to_doc, and any of {', '.join(DIRECTIONS[1:])}")
        self.temperature, self.margin, self.directions = temperature, margin, tuple(directions)
        self._texts: list[Tensor] = []

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        features = list(sentence_features)
        self._texts = [item_keys(each) for each in features]
        return super().forward(features, labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of vectors, one tensor (B, D) a column."""
        rows, texts = slice(0, len(embeddings[0])), self._texts
        if self.gather_across_devices:
            first = get_rank() * len(embeddings[0])
            rows = slice(first, first + len(embeddings[0]))
            embeddings = [all_gather_with_grad(each) for each in embeddings]
            texts = [all_gather(each) for each in texts]
        return qwen3_info_nce(embeddings, texts, rows, self.temperature, self.margin, self.directions)


def qwen3_info_nce(
    columns: list[Tensor],
    texts: list[Tensor],
    rows: slice,
    temperature: float,
    margin: float | None,
    directions: tuple[str, ...],
) -> Tensor:
    """The mean loss of the queries `rows` against the texts of all columns.

    columns: vectors (B, D) of queries, positives, and negatives; texts: keys (B,) of each, equal where
    the texts are.
    """
    columns = [normalize(each, dim=1) for each in columns]
    queries, passages = columns[0], torch.cat(columns[1:])
    size, per_query = len(queries), len(columns) - 1
    own = torch.eye(size, dtype=torch.bool, device=queries.device)[rows]  # (R, B)
    own_passages = own.repeat(1, per_query)
    positives = (queries[rows] * columns[1][rows]).sum(1)  # (R,)
    # The own hard negatives follow the own positive, and are negatives.
    own_positive = torch.cat([own, own.new_zeros(len(own), size * (per_query - 1))], 1)  # (R, B * N)
    same_query = texts[0][rows][:, None] == texts[0][None]
    # A repeated query has several positives: texts that are one of them, and queries that one belongs to.
    same_passage = _any_of(same_query, texts[1], torch.cat(texts[1:]))
    shared = _any_of(same_query, texts[1], texts[1])
    of = {  # similarities, what is no negative, what may be a positive
        "query_to_doc": (queries[rows] @ passages.T, own_positive, same_passage),
        "query_to_query": (queries[rows] @ queries.T, own, same_query | shared),
        "doc_to_doc": (columns[1][rows] @ passages.T, own_passages, same_passage),
    }
    negatives = []
    for direction in directions:
        similarities, excluded, doubtful = of[direction]
        if margin is not None:
            excluded = excluded | doubtful | (similarities.detach() > positives.detach()[:, None] + margin)
        negatives.append((similarities / temperature).masked_fill(excluded, -torch.inf))
    positive = positives / temperature
    return (torch.logsumexp(torch.cat([positive[:, None], *negatives], 1), 1) - positive).mean()


def _any_of(chosen: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Mark the texts of `b` that are among those of `a` that a row chooses.   (R, A), (A,), (C,) -> (R, C)"""
    return chosen.float() @ (a[:, None] == b[None]).float() > 0


def text_keys(ids: Tensor, mask: Tensor) -> Tensor:
    """A number for each text, the same for the same tokens wherever the padding is.   (B, T) -> (B,) int64

    A polynomial of the tokens over their places, modulo 2**64.
    """
    places = mask.long().cumsum(1) * mask
    weights = (places * -7046029254386353131).bitwise_xor(places * 2862933555777941757 + 3037000493)
    return ((ids.long() + 1) * weights * mask).sum(1)


def item_keys(features: dict[str, Tensor]) -> Tensor:
    """A number for each item of a batch, the same for the same tokens and pixels.   -> (B,) int64

    Of a text alone it is that of `text_keys`. Images come as a tensor an item, or as rows of patches with
    `image_grid_thw` and `num_images_per_sample` (Qwen2-VL); what comes otherwise is the same for no two.
    """
    pixels = features.get("pixel_values")
    keys = text_keys(features["input_ids"], features["attention_mask"]) if "input_ids" in features else None
    if pixels is None:
        assert keys is not None, "neither tokens nor pixels"
        return keys
    bits = pixels.flatten(1).float().contiguous().view(torch.int32).long()
    odd = 2 * torch.arange(bits.shape[1], device=bits.device) + 1
    rows = (bits * odd * -7046029254386353131).sum(1)
    of, grid = features.get("num_images_per_sample"), features.get("image_grid_thw")
    if keys is None or len(rows) == len(keys):
        return rows if keys is None else keys + rows
    if of is None or grid is None:
        return torch.randint(-(2**62), 2**62, keys.shape, device=keys.device)
    item = torch.arange(len(keys), device=keys.device).repeat_interleave(of)
    return keys.index_add(0, item.repeat_interleave(grid.prod(1)), rows)
