# pyright: reportPrivateUsage=false
"""Attention over packed rows: trajectories one after another, none of which sees another.

A mask that keeps them apart would have T x T entries. Instead the row is cut into its trajectories and
each attends causally within itself: by PyTorch's kernel for variable lengths on a GPU, else by one call
of its flash kernel each. The attention that transformers models look up by name is replaced by ours,
which is theirs whenever a row is not packed: gradient checkpointing runs it again in the backward pass,
and an engine that shares the model goes on with its masks.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from data.errors import ConfigError

NAME = "sleuth_packed"
_NO_MASK = torch.empty(1, 1, 0, 0)
"""Four dimensions are taken for a finished mask. Attention other than ours fails on it, as it should."""


def packed_arguments(trunk: PreTrainedModel, lengths: list[int]) -> dict[str, Any]:
    """Return the arguments by which a trunk reads one row (1, sum(lengths)) as several trajectories.

    From here on the trunk looks up our attention; see `check_packing`.
    """
    if trunk.config._attn_implementation != NAME:
        check_packing(trunk)
        trunk.config._attn_implementation = NAME
    ends = torch.tensor([0, *lengths]).cumsum(0).int().to(trunk.device)
    return {"attention_mask": _NO_MASK, "cu_seq_lens_q": ends, "segment_tokens": lengths}


def check_packing(trunk: PreTrainedModel) -> None:
    """ConfigError if the model's attention cannot be cut into trajectories."""
    config = trunk.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    reasons = {
        f"layers of kind {sorted(kinds)}": not kinds <= {"full_attention", "sliding_attention"},
        "a recurrent state": trunk._is_stateful,
        "attention of its own": not (trunk._supports_attention_backend and trunk._supports_sdpa),
        "soft caps on its attention": getattr(config, "attn_logit_softcapping", None),
        "attention sinks": any(name.endswith("sinks") for name, _ in trunk.named_parameters()),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ConfigError(f"packing = true: {config.model_type} has {reason}; set packing: false")


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segment_tokens: list[int] | None = None,
    cu_seq_lens_q: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment of a row, or that of transformers where nothing is packed.

    query (1, heads, T, D), key and value (1, key-value heads, T, D) -> (1, T, heads, D).
    """
    if segment_tokens is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if _has_kernel(query) and not kwargs.get("dropout"):
        q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
        ends, longest = cu_seq_lens_q, max(segment_tokens)
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        options = {"scale": kwargs.get("scaling"), "window_size": window, "enable_gqa": True}
        return varlen_attn(q, k, v, ends, ends, longest, longest, **options)[None], None  # type: ignore
    segments = zip(*(part.split(segment_tokens, dim=2) for part in (query, key, value)), strict=True)
    outputs = [
        sdpa_attention_forward(module, q, k, v, _window_mask(q, sliding_window), **kwargs)[0]
        for q, k, v in segments
    ]
    return torch.cat(outputs, dim=1), None


def _has_kernel(query: Tensor) -> bool:
    """Return whether PyTorch's kernel for variable lengths takes these heads."""
    takes = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256
    return takes and "enable_gqa" in signature(varlen_attn).parameters  # torch from 2.12 on


def _window_mask(query: Tensor, window: int | None) -> Tensor | None:
    """None where causal attention is all, else a mask (L, L) of the `window` positions up to each."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    ones = torch.ones(length, length, dtype=torch.bool, device=query.device)
    return ones.tril() & ones.triu(1 - window)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
