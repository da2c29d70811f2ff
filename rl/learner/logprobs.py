# pyright: reportPrivateUsage=false
"""Log-probs of taken tokens under a policy, with their entropy, where they are needed and nowhere else.

The head is applied only at the positions that predict a trained token (a trajectory is mostly what it
read), a chunk of tokens at a time, and again in the backward pass: logits of a whole micro-batch never
exist, nor do their gradients.

In a packed row none of the trajectories sees another. A mask would have T x T entries; instead each attends
causally within itself, by PyTorch's kernel for variable lengths on a GPU, else by one call of its flash
kernel each. The attention that transformers models look up by name is replaced by ours, which is theirs
whenever a row is not packed: an engine that shares the model goes on with its masks.
"""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from agent.engines.sampling import kept_tokens
from agent.vision import Vision, text_trunk
from data.errors import ConfigError

if TYPE_CHECKING:
    from rl.config import RolloutConfig
    from rl.learner.batch import MicroBatch

PACKED = "sleuth_packed"
_NO_MASK = torch.empty(1, 1, 0, 0)
"""Four dimensions are taken for a finished mask. Attention other than ours fails on it, as it should."""


class TokenLogprobs(NamedTuple):
    """One entry a trained token of a micro-batch."""

    logprobs: Tensor  # (N,)
    entropy: Tensor  # (N,), in nats


def hidden_states(trunk: PreTrainedModel, batch: MicroBatch, vision: Vision | None = None) -> Tensor:
    """The trunk's last hidden states (N, H) at the positions before the trained tokens.

    vision: of a policy with eyes; the trunk reads the pixels that the sampler read, with their gradient.
    """
    device = trunk.device
    inputs = {"input_ids": batch.token_ids.to(device)}
    if vision is not None:
        inputs = {"inputs_embeds": vision.embed(trunk, inputs["input_ids"], batch.pictures)}
        trunk = text_trunk(trunk)
    elif batch.pictures:
        raise ValueError("hidden_states: trajectories with pictures need the policy's vision")
    masking = (
        packed_arguments(trunk, batch.lengths)
        if batch.attention_mask is None
        else {"attention_mask": batch.attention_mask.to(device)}
    )
    hidden = trunk(
        **inputs,
        position_ids=batch.position_ids.to(device),
        use_cache=False,
        **masking,
    ).last_hidden_state  # (R, T, H)
    before = _trained(batch) - 1  # in the same row and trajectory: its first token is never trained
    return hidden.flatten(0, 1).index_select(0, before.to(device))


def _trained(batch: MicroBatch) -> Tensor:
    """Places of the trained tokens (N,) in the flattened rows."""
    return batch.loss_mask.flatten().nonzero()[:, 0]


class Scorer(nn.Module):
    """A policy as a function of micro-batches: what it thinks of the tokens that were sampled.

    Log-probs are those of the distribution that was sampled from: at its temperature and, with
    `renormalise_logprobs`, within what top_p and top_k leave of it. A taken token always counts as left:
    sampler and trainer round differently at the edge.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rollout: RolloutConfig,
        chunk_tokens: int = 256,
        vision: Vision | None = None,
    ) -> None:
        super().__init__()
        self.model, self.rollout, self.chunk_tokens, self.vision = model, rollout, chunk_tokens, vision

    def forward(self, batch: MicroBatch, entropy_gradient: bool = False) -> TokenLogprobs:
        """Log-probs of the trained tokens given all before them, and the entropy at each of them."""
        hidden = hidden_states(self.model.base_model, batch, self.vision)  # type: ignore[arg-type]  # (N, H)
        taken = batch.token_ids.flatten()[_trained(batch)].to(hidden.device)
        chunks = zip(hidden.split(self.chunk_tokens), taken.split(self.chunk_tokens), strict=True)
        scores = [
            checkpoint(self._score, *chunk, entropy_gradient, use_reentrant=False, preserve_rng_state=False)
            for chunk in chunks
        ]
        return TokenLogprobs(*(torch.cat(parts) for parts in zip(*scores, strict=True)))

    def _score(self, hidden: Tensor, taken: Tensor, entropy_gradient: bool) -> tuple[Tensor, Tensor]:
        """Log-probs and entropy (C,) of a chunk of hidden states (C, H)."""
        distribution = torch.log_softmax(self._logits(hidden, taken), -1)  # (C, V)
        logprobs = distribution.gather(1, taken[:, None])[:, 0]
        # Last, so that the backward pass, which needs nothing of it, does not run it again.
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            entropy = -(distribution.exp() * distribution).sum(-1)
        return logprobs, entropy

    def _logits(self, hidden: Tensor, taken: Tensor) -> Tensor:
        """Logits (C, V) in float32, at the sampler's temperature; what it left out is the lowest number."""
        head: Any = self.model.get_output_embeddings()
        logits = head(hidden).float()
        # What some architectures do after their head: Cohere, Granite, Gemma 2.
        names = ("logit_scale", "logits_scaling", "final_logit_softcapping")
        config = self.model.config.get_text_config()
        times, over, cap = (getattr(config, name, None) for name in names)
        if times or over:
            logits = logits * ((times or 1) / (over or 1))
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        if self.rollout.temperature != 1:
            logits = logits / self.rollout.temperature
        if self.rollout.renormalise_logprobs and (self.rollout.top_p < 1 or self.rollout.top_k):
            with torch.no_grad():
                kept = kept_tokens(logits.softmax(-1), [self.rollout.top_k], [self.rollout.top_p])
                kept.scatter_(1, taken[:, None], True)
            logits = logits.masked_fill(~kept, torch.finfo(logits.dtype).min)
        return logits


def packed_arguments(trunk: PreTrainedModel, lengths: list[int]) -> dict[str, Any]:
    """Return the arguments by which a trunk reads one row (1, sum(lengths)) as several trajectories.

    From here on the trunk looks up our attention; see `check_packing`.
    """
    if trunk.config._attn_implementation != PACKED:
        check_packing(trunk)
        trunk.config._attn_implementation = PACKED
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


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
