"""Log-probs of taken tokens under a policy, with their entropy, where they are needed and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rl.batch import MicroBatch


@dataclass(frozen=True)
class TokenLogprobs:
    """One entry a trained token of a micro-batch, row by row."""

    logprobs: Tensor  # (N,)
    entropy: Tensor  # (N,), in nats, without gradient


def token_logprobs(model: PreTrainedModel, batch: MicroBatch, temperature: float) -> TokenLogprobs:
    """Log-probs and entropy of the trained tokens, given all tokens before them.

    The head is applied only at the N positions that predict a trained token: a trajectory is mostly
    what it read. Positions count tokens, so padding on the right changes nothing.
    """
    device = model.device
    hidden = model.base_model(
        input_ids=batch.token_ids.to(device),
        attention_mask=batch.attention_mask.to(device),
        use_cache=False,
    ).last_hidden_state  # (B, T, H)
    mask = batch.loss_mask[:, 1:].to(device)
    targets = batch.token_ids[:, 1:].to(device)[mask]  # (N,)
    logits = _head(model, hidden[:, :-1][mask]).float() / temperature  # (N, V)
    log_distribution = torch.log_softmax(logits, dim=-1)
    with torch.no_grad():
        entropy = -(log_distribution.exp() * log_distribution).sum(-1)
    return TokenLogprobs(log_distribution.gather(1, targets[:, None])[:, 0], entropy)


def _head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (N, V) of hidden states (N, H), with the soft cap that some models put on them."""
    head: Any = model.get_output_embeddings()
    logits = head(hidden)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
