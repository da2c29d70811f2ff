"""The policy's loss of each token: surrogate, correction for the sampler, KL divergence, entropy bonus.

Sampler against trainer: the same weights give other log-probs in another engine. Measure, and correct.
Of a token that was not sampled (a demonstration, an observation that is trained) no sampler's log-prob is
known: it has weight 1 and is in no measure. A mask says which these are. A log-prob of 0 is as good as any
other: below temperature 1 it is what many sampled tokens have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from rl.algorithm.losses import (
    KL_ESTIMATORS,
    MAX_LOG_RATIO,
    SURROGATES,
    PolicyTokens,
    clamped,
    clip_fraction,
    kl_clamped,
    llds,
    off_policy_mask,
)
from rl.algorithm.presets import AlgorithmConfig
from rl.learner.workers import Totals, add_total


@dataclass(frozen=True)
class ScoredTokens(PolicyTokens):
    """All that the loss of a micro-batch's tokens reads; `logprobs` and `entropy` have a gradient."""

    entropy: Tensor  # (N,)
    sampler_logprobs: Tensor  # (N,)
    sampled: Tensor  # (N,) bool, the tokens that the sampler drew
    ref_logprobs: Tensor | None  # (N,); None: no KL in the loss
    turns: Tensor | None = None  # (N,) long, from 0 in each trajectory; for llds alone


def policy_loss(tokens: ScoredTokens, algorithm: AlgorithmConfig, totals: Totals) -> Tensor:
    """Return the loss of each token (N,); its metrics are added to the totals."""
    count = tokens.logprobs.numel()
    given = tokens.old_logprobs, tokens.sampler_logprobs
    weights = sampler_weights(
        algorithm.importance, algorithm.importance_cap, *given, tokens.row, tokens.sampled
    )
    loss = SURROGATES[algorithm.surrogate](tokens, algorithm) * weights
    if algorithm.off_policy_threshold:
        sampler = tokens.sampler_logprobs.where(tokens.sampled, tokens.logprobs.detach())
        kept = off_policy_mask(tokens, sampler, algorithm.off_policy_threshold)
        add_total(totals, "policy/off_policy_fraction", float((1 - kept).sum()), count)
        loss = loss * kept
    if algorithm.llds_coefficient and tokens.turns is not None:
        turn_of = tokens.row * (1 + int(tokens.turns.max()) if count else 1) + tokens.turns
        lost = llds(tokens, turn_of if algorithm.llds_gate == "action" else tokens.row)
        add_total(totals, "policy/llds_fraction", float((lost > 0).sum()), count)
        loss = loss + algorithm.llds_coefficient * lost
    for name, value in mismatch(*given, tokens.sampled).items():
        add_total(totals, f"policy/sampler_{name}", value, int(tokens.sampled.sum()))
    add_total(totals, "policy/importance_weight", float(weights.sum()), count)
    add_total(totals, "policy/clip_fraction", float(clip_fraction(tokens, algorithm)) * count, count)
    add_total(totals, "policy/clamped_fraction", clamped(tokens, algorithm), count)
    add_total(totals, "policy/entropy", float(tokens.entropy.detach().sum()), count)
    if tokens.ref_logprobs is not None:
        both = tokens.logprobs, tokens.ref_logprobs
        kl = KL_ESTIMATORS[algorithm.kl_estimator](*both)
        add_total(totals, "policy/kl", float(kl.detach().sum()), count)
        add_total(totals, "policy/kl_clamped_fraction", kl_clamped(algorithm.kl_estimator, *both), count)
        if algorithm.kl_unbiased:
            kl = kl * (tokens.sequence_ratio if algorithm.surrogate == "gspo" else tokens.ratio)
        loss = loss + algorithm.kl_coefficient * kl
    if algorithm.entropy_coefficient:
        loss = loss - algorithm.entropy_coefficient * tokens.entropy
    return loss


def sampler_weights(
    kind: str,
    cap: float,
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    row: Tensor,
    sampled: Tensor | None = None,
) -> Tensor:
    """Weights of the tokens' losses that correct for the sampler; log-probs (N,), row (N,) long -> (N,).

    sampled: (N,) bool, the tokens that the sampler drew; None: all.

    token: the ratio trainer / sampler of each token, at most `cap` (truncated importance sampling; Yao
    et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training").
    sequence: 0 for trajectories whose ratio, the product over their policy tokens (as TRL's
    `sequence_mask`, no geometric mean: long trajectories go first), is above `cap` or below 1 / cap; 1 for
    the others. That is the rejection of masked importance sampling (Liu et al. 2025, "When Speed Kills
    Stability") without its ratio as weight.
    token_mask: the ratio of each token, 0 where it is above `cap` or below 1 / cap (IcePop; also TRL's).
    sequence_truncate: the ratio of the trajectory, at most `cap`, on all its tokens (TRL's name).
    """
    log_ratio = _log_ratio(old_logprobs, sampler_logprobs, sampled)
    if kind == "token":
        return log_ratio.exp().clamp(max=cap)
    if kind == "token_mask":
        return log_ratio.exp().masked_fill(log_ratio.abs() > math.log(cap), 0)
    if kind in ("sequence", "sequence_truncate"):
        size = row.bincount().numel()
        summed = log_ratio.new_zeros(size).index_add(0, row, log_ratio)
        if kind == "sequence_truncate":
            return summed.clamp(max=math.log(cap)).exp()[row]
        return (summed.abs() <= math.log(cap)).to(log_ratio.dtype)[row]
    return log_ratio.new_ones(log_ratio.shape)


def mismatch(
    old_logprobs: Tensor, sampler_logprobs: Tensor, sampled: Tensor | None = None
) -> dict[str, float]:
    """Sums over the sampled tokens of (N,), to be divided by their number; trainer / sampler is the ratio r.

    difference: of |log r|; k3: of r - 1 - log r, which estimates KL(sampler || trainer); ratio_above_2,
    ratio_below_half: tokens of such a ratio.
    """
    log_ratio = _log_ratio(old_logprobs, sampler_logprobs, sampled)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    sums = {
        "difference": log_ratio.abs().sum(),
        "k3": (ratio - 1 - log_ratio).sum(),
        "ratio_above_2": (ratio > 2).sum(),
        "ratio_below_half": (ratio < 0.5).sum(),
    }
    return {name: float(value) for name, value in sums.items()}


def _log_ratio(old_logprobs: Tensor, sampler_logprobs: Tensor, sampled: Tensor | None) -> Tensor:
    """log(trainer / sampler), 0 where the token was not sampled; nothing here has a gradient."""
    difference = (old_logprobs - sampler_logprobs).detach()
    return difference if sampled is None else difference.masked_fill(~sampled, 0)
