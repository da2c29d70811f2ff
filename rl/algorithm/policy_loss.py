"""The policy's loss of each token: surrogate, correction for the sampler, KL divergence, entropy bonus."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rl.algorithm.importance import mismatch, sampler_weights
from rl.algorithm.losses import (
    KL_ESTIMATORS,
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
