"""Draws tokens from logits, each row by a uniform number of its own, and says how likely they were."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from agent.engines.base import Sampling


def draw(logits: Tensor, samplings: list[Sampling], uniforms: list[float]) -> tuple[list[int], list[float]]:
    """A token a row by inverse transform of its uniform number, and its log-prob.

    logits (R, V); the log-prob is under the row's temperature (1 where it is greedy), before top-k and
    top-p unless the row asks to renormalise.
    """
    device = logits.device
    temperature = torch.tensor([s.temperature or 1.0 for s in samplings], device=device)
    logprobs = torch.log_softmax(logits / temperature[:, None], dim=-1)
    left = torch.ones(len(samplings), device=device)  # the mass that top-k and top-p leave
    if all(s.temperature == 0 for s in samplings):
        tokens = logits.argmax(-1)
    else:
        weights = logprobs.exp()
        if any(s.top_p < 1 or s.top_k for s in samplings):
            kept = kept_tokens(weights, [s.top_k for s in samplings], [s.top_p for s in samplings])
            weights = weights * kept
        totals = weights.cumsum(-1, dtype=torch.float64)
        targets = torch.tensor(uniforms, dtype=torch.float64, device=device) * totals[:, -1]
        tokens = torch.searchsorted(totals, targets[:, None], right=True)[:, 0]
        greedy = torch.tensor([s.temperature == 0 for s in samplings], device=device)
        tokens = torch.where(greedy, logits.argmax(-1), tokens.clamp(max=logits.shape[1] - 1))
        renormalised = torch.tensor([s.renormalise for s in samplings], device=device)
        left = torch.where(renormalised, totals[:, -1], 1.0).to(logprobs.dtype)
    taken = logprobs.gather(1, tokens[:, None])[:, 0] - left.log()
    return tokens.tolist(), taken.tolist()


def kept_tokens(probabilities: Tensor, top_k: list[int], top_p: list[float]) -> Tensor:
    """Return the tokens that top-k (0: all) and top-p keep, bool (R, V); one value a row, or one for all."""
    size, device = probabilities.shape[1], probabilities.device
    most = torch.tensor([k or size for k in top_k], device=device)
    mass = torch.tensor(top_p, device=device)
    ranked, order = probabilities.sort(dim=-1, descending=True)
    before = ranked.cumsum(-1) - ranked  # mass of the better ones: the first is always kept
    kept = (torch.arange(size, device=device) < most[:, None]) & (before < mass[:, None])
    return torch.zeros_like(kept).scatter(1, order, kept)
