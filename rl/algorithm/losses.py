"""The losses, token by token: surrogates, KL estimates, the policy's loss and its averaging, the critic's.

Pure functions of flat tensors (N,), the policy tokens of a micro-batch, one trajectory after another. A new
surrogate or estimate is a function here and a line of its table: the configuration takes its names from
there. Torch is not imported on loading, for the configuration's sake.

The same weights give other log-probs in another engine: that is measured, and corrected. A token that was
not sampled (an observation that is trained) has weight 1 there and is in no measure; a mask says which.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from rl.learner.workers import Totals

Averaging = Literal["token", "trajectory", "constant"]

MAX_LOG_RATIO = 20.0
"""Beyond it, up or down, the log-ratio of a token counts as the bound and has no gradient, as in verl: its
exponential would be a loss that no float holds. It also bounds k3."""
MAX_SEQUENCE_LOG_RATIO = 10.0
"""The same for the mean of a trajectory (gspo), upwards."""


@dataclass(frozen=True)
class PolicyTokens:
    """The tokens of a micro-batch; only `logprobs` has a gradient."""

    logprobs: Tensor  # (N,) under the policy as it is now
    old_logprobs: Tensor  # (N,) under the policy that sampled, by the trainer
    advantages: Tensor  # (N,)
    row: Tensor  # (N,) long, from 0: the trajectory each token belongs to; trajectories are whole

    @property
    def ratio(self) -> Tensor:
        """The factor by which each token has become likelier (N,)."""
        return (self.logprobs - self.old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()

    @property
    def sequence_ratio(self) -> Tensor:
        """The geometric mean of its trajectory's ratios, for each token, with the token's own gradient (N,).

        GSPO-token (Zheng et al. 2025, arXiv 2507.18071, section 4.3): where the tokens of a trajectory share
        advantage and weight, loss and gradient are those of GSPO, one ratio a trajectory.
        """
        moved = self.sequence_log_ratio + self.logprobs - self.logprobs.detach()
        return moved.clamp(max=MAX_SEQUENCE_LOG_RATIO).exp()

    @property
    def sequence_log_ratio(self) -> Tensor:
        """The mean of its trajectory's log-ratios, for each token (N,); no gradient."""
        counts = self.row.bincount().clamp(min=1)
        difference = (self.logprobs - self.old_logprobs).detach()
        means = difference.new_zeros(counts.numel()).index_add(0, self.row, difference) / counts
        return means[self.row]


@dataclass(frozen=True)
class ScoredTokens(PolicyTokens):
    """All that the loss of a micro-batch's tokens reads; `logprobs` and `entropy` have a gradient."""

    entropy: Tensor  # (N,)
    sampler_logprobs: Tensor  # (N,)
    sampled: Tensor  # (N,) bool, the tokens that the sampler drew
    ref_logprobs: Tensor | None  # (N,); None: no KL in the loss
    turns: Tensor | None = None  # (N,) long, from 0 in each trajectory; for llds alone


class Clipping(Protocol):
    """The fields of `AlgorithmConfig` that a surrogate reads."""

    @property
    def surrogate(self) -> str: ...
    @property
    def clip_low(self) -> float: ...
    @property
    def clip_high(self) -> float: ...
    @property
    def dual_clip(self) -> float: ...
    @property
    def sapo_temperature(self) -> float: ...
    @property
    def sapo_temperature_negative(self) -> float: ...


class PolicyLoss(Clipping, Protocol):
    """Settings that the policy's loss reads, too."""

    @property
    def importance(self) -> str: ...
    @property
    def importance_cap(self) -> float: ...
    @property
    def off_policy_threshold(self) -> float: ...
    @property
    def llds_coefficient(self) -> float: ...
    @property
    def llds_gate(self) -> str: ...
    @property
    def kl_estimator(self) -> str: ...
    @property
    def kl_unbiased(self) -> bool: ...
    @property
    def kl_coefficient(self) -> float: ...
    @property
    def entropy_coefficient(self) -> float: ...


def ppo(tokens: PolicyTokens, algorithm: Clipping) -> Tensor:
    """Clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7), to be minimised.

    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A); the two bounds apart as in DAPO (arXiv 2503.14476,
    eq. 10), and for A < 0 no more than -dual_clip A (Ye et al. 2020, arXiv 1912.09729).
    """
    return _clipped(tokens.ratio, tokens.advantages, algorithm)


def gspo(tokens: PolicyTokens, algorithm: Clipping) -> Tensor:
    """The clipped surrogate with one ratio a trajectory, the geometric mean of its tokens' (GSPO)."""
    return _clipped(tokens.sequence_ratio, tokens.advantages, algorithm)


def cispo(tokens: PolicyTokens, algorithm: Clipping) -> Tensor:
    """-sg(min(r, 1 + clip_high)) A log p: the clip bounds the weight but cuts no token's gradient.

    MiniMax 2025, arXiv 2506.13585, eq. 4, with no lower bound, as they ran it; `clip_low` is not read.
    """
    return -tokens.ratio.detach().clamp(max=1 + algorithm.clip_high) * tokens.advantages * tokens.logprobs


def reinforce(tokens: PolicyTokens, algorithm: Clipping) -> Tensor:
    """-sg(r) A log p: REINFORCE (Williams 1992), each token weighted by its ratio when off-policy.

    Its gradient is that of -r A, the surrogate without a clip; its value means nothing.
    """
    return -tokens.ratio.detach() * tokens.advantages * tokens.logprobs


def dppo(tokens: PolicyTokens, algorithm: Clipping) -> Tensor:
    """-r A without the tokens whose *probability* has changed by more than the bounds and would go further.

    DPPO (arXiv 2602.04879), the mask by total variation: a ratio of 2 is nothing at a rare token and a lot at
    a common one. A > 0: p - old_p <= clip_high; A < 0: old_p - p <= clip_low.
    """
    return -(tokens.ratio * tokens.advantages).masked_fill(dppo_cut(tokens, algorithm), 0)


def dppo_cut(tokens: PolicyTokens, algorithm: Clipping) -> Tensor:
    """Tokens that dppo leaves out (N,) bool."""
    change = tokens.logprobs.detach().exp() - tokens.old_logprobs.exp()
    rising = (change > algorithm.clip_high) & (tokens.advantages > 0)
    return rising | ((change < -algorithm.clip_low) & (tokens.advantages < 0))


def sapo(tokens: PolicyTokens, algorithm: Clipping) -> Tensor:
    """A soft gate in place of the clip: -sigmoid(t (r - 1)) 4 / t A, with a t for each sign of A.

    SAPO (Gao et al. 2025, arXiv 2511.20347), as in TRL.
    """
    rising = tokens.advantages > 0
    temperature = rising * algorithm.sapo_temperature + ~rising * algorithm.sapo_temperature_negative
    return -(temperature * (tokens.ratio - 1)).sigmoid() * 4 / temperature * tokens.advantages


SURROGATES: dict[str, Callable[[PolicyTokens, Clipping], Tensor]] = {
    "ppo": ppo,
    "gspo": gspo,
    "cispo": cispo,
    "reinforce": reinforce,
    "dppo": dppo,
    "sapo": sapo,
}
"""(tokens, algorithm) -> loss of each token (N,)."""


def clip_fraction(tokens: PolicyTokens, algorithm: Clipping) -> Tensor:
    """Share of tokens () whose gradient the clip cuts off (ppo, gspo, dppo) or whose weight falls (cispo).

    0 without tokens, and for reinforce and sapo, which have no clip.
    """
    ratio = (tokens.sequence_ratio if algorithm.surrogate == "gspo" else tokens.ratio).detach()
    high, low = ratio > 1 + algorithm.clip_high, ratio < 1 - algorithm.clip_low
    if algorithm.surrogate == "cispo":
        cut = high
    elif algorithm.surrogate == "dppo":
        cut = dppo_cut(tokens, algorithm)
    elif algorithm.surrogate in ("reinforce", "sapo"):
        cut = high & False
    else:
        low |= ratio > (algorithm.dual_clip or math.inf)
        cut = high.where(tokens.advantages > 0, low) & (tokens.advantages != 0)
    return cut.float().sum() / max(1, cut.numel())


ROUNDING = 1e-5
"""Nats by which two float32 log-probs may differ that were computed in batches of other shapes."""


def llds(tokens: PolicyTokens, unit: Tensor) -> Tensor:
    """The likelihood lost by tokens that should have kept it: max(0, old log p - log p) (N,).

    LLDS (arXiv 2512.04220): only where the advantage is not negative, and where the unit of the token lost
    likelihood as a whole. unit: (N,) long, from 0: the trajectory (response gate) or the turn (action gate).
    """
    lost = tokens.old_logprobs - tokens.logprobs
    lost = lost * (lost.detach().abs() > ROUNDING)
    sizes = lost.new_zeros(int(unit.max()) + 1 if unit.numel() else 0)
    fell = sizes.index_add(0, unit, lost.detach()) > 0
    return lost.relu() * (fell[unit] & (tokens.advantages >= 0))


def off_policy_mask(tokens: PolicyTokens, sampler_logprobs: Tensor, threshold: float) -> Tensor:
    """0 for tokens of negative advantage in trajectories that have become too unlikely, else 1 (N,).

    Off-policy sequence masking (DeepSeek-V3.2, arXiv 2512.02556), as in TRL: too unlikely is a mean of
    sampler's less current log-probs above the threshold.
    """
    difference = sampler_logprobs - tokens.logprobs.detach()
    counts = tokens.row.bincount().clamp(min=1)
    means = difference.new_zeros(counts.numel()).index_add(0, tokens.row, difference) / counts
    return ((tokens.advantages >= 0) | (means[tokens.row] <= threshold)).to(difference.dtype)


def clamped(tokens: PolicyTokens, algorithm: Clipping) -> int:
    """Count the tokens whose log-ratio is beyond the bound."""
    if algorithm.surrogate == "gspo":
        return int((tokens.sequence_log_ratio > MAX_SEQUENCE_LOG_RATIO).sum())
    return int(((tokens.logprobs - tokens.old_logprobs).abs() > MAX_LOG_RATIO).sum())


def token_weights(
    averaging: Averaging, counts: Tensor, total_tokens: int, total_trajectories: int, constant_tokens: int
) -> Tensor:
    """Weights (N,) by which the summed loss of the micro-batches is the average over the global batch.

    counts: (b,) policy tokens of each trajectory of this micro-batch; the totals are of the global batch.
    token: every token alike (DAPO, arXiv 2503.14476, eq. 8); trajectory: the mean over trajectories of
    their means (GRPO, arXiv 2402.03300, eq. 3); constant: every trajectory's sum over `constant_tokens`,
    whatever its length (Dr. GRPO, arXiv 2503.20783).
    """
    if averaging == "trajectory":
        each = 1 / (counts.clamp(min=1) * max(1, total_trajectories))
    else:
        divisor = total_tokens if averaging == "token" else total_trajectories * constant_tokens
        each = counts.float().new_full(counts.shape, 1 / max(1, divisor))
    return each.repeat_interleave(counts)


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log(p / q): unbiased. For kl_in reward; in the loss its gradient is zero on average.   (N,) -> (N,)"""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Half of log(p / q) squared: biased, but its gradient in the loss is the KL's own.   (N,) -> (N,)"""
    return (logprobs - ref_logprobs).square() / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """q / p - 1 - log(q / p): unbiased and never negative; its gradient is another's.   (N,) -> (N,)"""
    difference = (ref_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return difference.exp() - 1 - difference


def kl_clamped(estimator: str, logprobs: Tensor, ref_logprobs: Tensor) -> int:
    """Count the tokens whose log-ratio is beyond the bound of the estimator."""
    return int(((logprobs - ref_logprobs).abs() > MAX_LOG_RATIO).sum()) if estimator == "k3" else 0


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
"""Estimates of KL(policy p || reference q) at tokens that p sampled (Schulman 2020, "Approximating KL
divergence"; on their gradients: arXiv 2512.21852)."""


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error, clipped as in Schulman's code for PPO (arXiv 1707.06347; the half is verl's).

    All (N,) -> (N,). The worse of the error and that of the value held within `clip` of the old one: a
    value that has moved further, towards its return, has no gradient. clip 0: the plain squared error.
    """
    error = (values - returns) ** 2
    if clip:
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = error.maximum((near - returns) ** 2)
    return 0.5 * error


def policy_loss(tokens: ScoredTokens, algorithm: PolicyLoss) -> tuple[Tensor, Totals]:
    """Return the loss of each token (N,), and its metrics."""
    count, totals = tokens.logprobs.numel(), {}
    given = tokens.old_logprobs, tokens.sampler_logprobs
    weights = sampler_weights(
        algorithm.importance, algorithm.importance_cap, *given, tokens.row, tokens.sampled
    )
    loss = SURROGATES[algorithm.surrogate](tokens, algorithm) * weights
    if algorithm.off_policy_threshold:
        sampler = tokens.sampler_logprobs.where(tokens.sampled, tokens.logprobs.detach())
        kept = off_policy_mask(tokens, sampler, algorithm.off_policy_threshold)
        totals["policy/off_policy_fraction"] = (float((1 - kept).sum()), count)
        loss = loss * kept
    if algorithm.llds_coefficient and tokens.turns is not None:
        turn_of = tokens.row * (1 + int(tokens.turns.max()) if count else 1) + tokens.turns
        lost = llds(tokens, turn_of if algorithm.llds_gate == "action" else tokens.row)
        totals["policy/llds_fraction"] = (float((lost > 0).sum()), count)
        loss = loss + algorithm.llds_coefficient * lost
    for name, value in mismatch(*given, tokens.sampled).items():
        totals[f"policy/sampler_{name}"] = (value, int(tokens.sampled.sum()))
    totals["policy/importance_weight"] = (float(weights.sum()), count)
    totals["policy/clip_fraction"] = (float(clip_fraction(tokens, algorithm)) * count, count)
    totals["policy/clamped_fraction"] = (clamped(tokens, algorithm), count)
    totals["policy/entropy"] = (float(tokens.entropy.detach().sum()), count)
    if tokens.ref_logprobs is not None:
        both = tokens.logprobs, tokens.ref_logprobs
        kl = KL_ESTIMATORS[algorithm.kl_estimator](*both)
        totals["policy/kl"] = (float(kl.detach().sum()), count)
        totals["policy/kl_clamped_fraction"] = (kl_clamped(algorithm.kl_estimator, *both), count)
        if algorithm.kl_unbiased:
            kl = kl * (tokens.sequence_ratio if algorithm.surrogate == "gspo" else tokens.ratio)
        loss = loss + algorithm.kl_coefficient * kl
    if algorithm.entropy_coefficient:
        loss = loss - algorithm.entropy_coefficient * tokens.entropy
    return loss, totals


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


def _clipped(ratio: Tensor, advantages: Tensor, algorithm: Clipping) -> Tensor:
    clipped = ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
    if algorithm.dual_clip:
        ratio = ratio.clamp(max=algorithm.dual_clip)  # beyond 1 + clip_high: matters where A < 0 alone
    return -(ratio * advantages).minimum(clipped * advantages)
