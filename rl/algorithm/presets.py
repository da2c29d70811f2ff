"""The settings of the algorithm, which combine freely, and the presets that name the known combinations.

advantage x surrogate x averaging x KL; the functions themselves are in advantages.py and losses.py.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, TypeAlias

from data.errors import require, require_range
from rl.algorithm.advantages import ADVANTAGES, WITH_CRITIC, WITHOUT_GROUPS
from rl.algorithm.losses import KL_ESTIMATORS, SURROGATES, Averaging

# The names of the tables. Not in a TYPE_CHECKING block: jsonargparse would read it, and take any text.
Advantage: TypeAlias = Literal[*ADVANTAGES]  # pyright: ignore
Surrogate: TypeAlias = Literal[*SURROGATES]  # pyright: ignore
Estimator: TypeAlias = Literal[*KL_ESTIMATORS]  # pyright: ignore
Potential: TypeAlias = Literal["coverage", "coverage_ordered", "answer_match"]
AnswerValue: TypeAlias = Literal["log_ratio", "probability", "logprob"]
_RANGES = {
    "> 0": "learning_rate critic_learning_rate max_grad_norm clip_high sapo_temperature "
    "sapo_temperature_negative",
    ">= 0": "warmup_steps decay_steps critic_warmup_steps critic_only_steps weight_decay averaging_tokens "
    "kl_coefficient entropy_coefficient value_clip dynamic_sampling_rounds llds_coefficient credit_weight "
    "off_policy_threshold",
    ">= 1": "importance_cap updates_per_rollout",
    "in [0, 1]": "gamma gae_lambda overlong_buffer",
    "in (0, 1)": "clip_low",
}
"""Range of each field by itself."""


@dataclass(frozen=True)
class AlgorithmConfig:
    """The way from rewards to an update. The defaults are GRPO with the token average of DAPO, on-policy."""

    learning_rate: float = 1e-6
    """Learning rate of the policy's AdamW, after `warmup_steps`."""
    warmup_steps: int = 0
    """Optimiser updates of linear warm-up."""
    decay_steps: int = 0
    """Last steps of the run over which the policy's learning rate falls linearly towards 0; 0: none."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm."""
    critic_learning_rate: float = 1e-5
    """Learning rate of the critic's AdamW (advantage gae only)."""
    critic_warmup_steps: int = 0
    """Optimiser updates of the critic's linear warm-up (advantage gae only)."""
    critic_only_steps: int = 0
    """First steps that train the critic alone (advantage gae only)."""
    advantage: Advantage = "grpo"
    """gae (PPO's, with a critic), grpo, dr_grpo, rloo, reinforce_pp, reinforce_pp_baseline, turn,
    search_credit (grpo, and what each search was first to find, on the tokens of its query), or
    answer_likelihood (grpo, and what each turn made of the gold answer's likelihood)."""
    gamma: float = 1.0
    """Discount a policy token (gae, reinforce_pp), or a turn (turn); observations are not counted."""
    gae_lambda: float = 1.0
    """Lambda of generalised advantage estimation: 1 is the plain return, 0 one step ahead."""
    whiten: bool = False
    """Shift and scale advantages to mean 0 and spread 1 over all policy tokens of the batch."""
    credit_potential: Potential = "coverage"
    """Potential that a search is paid by: the share of gold passages found, the same in the question's order,
    or a passage that holds a gold answer (answer_match, which needs no names of gold passages)."""
    credit_weight: float = 0.5
    """Weight of search_credit and answer_likelihood beside the outcome; their papers take .5 and .2."""
    credit_permuted: bool = False
    """Give the credit to others of the group at random: the control of both."""
    answer_value: AnswerValue = "log_ratio"
    """Measure that answer_likelihood compares: log_ratio (TRACE), probability or logprob (IGPO)."""
    surrogate: Surrogate = "ppo"
    """ppo (clipped), gspo (clipped, one ratio a trajectory), cispo, reinforce (ratio as weight), dppo (bounds
    the change of probability) or sapo (a soft gate)."""
    sapo_temperature: float = 1.0
    """Steepness of sapo's gate where the advantage is positive."""
    sapo_temperature_negative: float = 1.05
    """The same where it is not."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low (not by cispo)."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float = 0.0
    """Bound the loss at this ratio, such as 3, where the advantage is negative (surrogate ppo); 0: off."""
    averaging: Averaging = "token"
    """Over all policy tokens of the batch (token), per trajectory, or by a fixed token count (constant)."""
    averaging_tokens: int = 0
    """The fixed count a trajectory of averaging constant; 0: the most it may write."""
    updates_per_rollout: int = 1
    """Optimiser updates a batch of trajectories, each on its share of them; 1 is on-policy."""
    kl_coefficient: float = 0.0
    """Weight of the KL divergence from the starting policy; 0 loads no reference."""
    kl_estimator: Estimator = "k3"
    """Schulman's estimators: k1 unbiased, k2 half the square, k3 never negative."""
    kl_unbiased: bool = False
    """Weigh the KL in the loss by the ratio, for tokens that another policy sampled (DeepSeek-V3.2)."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Add it to the loss, or take it off the reward of each token."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    value_clip: float = 0.2
    """The critic's new values stay this near to its old ones (gae); 0: no clipping."""
    llds_coefficient: float = 0.0
    """Weight of the likelihood that tokens of advantage >= 0 lose (LLDS, arXiv 2512.04220); acts from the
    second update of a rollout on. 0: off."""
    llds_gate: Literal["action", "response"] = "action"
    """Only in turns, or trajectories, that lost likelihood as a whole."""
    off_policy_threshold: float = 0.0
    """Leave out tokens of negative advantage in trajectories that are by so many nats a token less likely
    than when they were sampled; 0: off."""
    importance: Literal["none", "token", "sequence", "token_mask", "sequence_truncate"] = "none"
    """Correct for a sampler that differs from the trainer: weights truncated a token (TIS), trajectories left
    out (MIS), tokens left out, or weights truncated a trajectory."""
    importance_cap: float = 2.0
    """Limit at which token weights are truncated; beyond it, or its inverse, a trajectory is left out."""
    dynamic_sampling_rounds: int = 0
    """Further rollouts that replace groups whose rewards are all equal (DAPO); 0: such groups stay."""
    overlong_buffer: float = 0.0
    """Share of the policy's tokens, the last, over which the reward falls to -1 (DAPO); 0: off."""
    learn_from_turn_limit: bool = True
    """False: a trajectory that the turn limit ended only counts in the mean of its group."""

    def __post_init__(self) -> None:
        for allowed, names in _RANGES.items():
            require_range(self, "algorithm.", allowed, *names.split())
        dual = self.dual_clip
        require(dual == 0 or dual > 1 + self.clip_high, "algorithm.dual_clip", dual, "0 or > 1 + clip_high")

    @property
    def needs_critic(self) -> bool:
        """Return whether values are learned beside the policy."""
        return self.advantage in WITH_CRITIC

    @property
    def needs_reference(self) -> bool:
        """Return whether the starting policy stays in memory."""
        return self.kl_coefficient > 0 or self.advantage == "answer_likelihood"

    @property
    def needs_groups(self) -> bool:
        """Return whether a trajectory is compared with others of its question."""
        return self.advantage not in WITHOUT_GROUPS or self.dynamic_sampling_rounds > 0


RECIPE_FIELDS = (
    "learning_rate",
    "warmup_steps",
    "decay_steps",
    "weight_decay",
    "max_grad_norm",
    "critic_learning_rate",
    "critic_warmup_steps",
    "critic_only_steps",
)
"""No preset sets these: they depend on the model and the data, not on the algorithm."""

_SEARCH_R1 = {"kl_coefficient": 0.001, "entropy_coefficient": 0.001, "updates_per_rollout": 2}

PRESETS: dict[str, dict[str, Any]] = {
    # Jin et al. 2025, arXiv 2503.09516. Its batch of 512 in mini-batches of 256 is two updates, which
    # its code makes ten for GRPO (the mini-batch is not scaled by the group), and its GAE, whitening
    # and critic also see observation tokens: ours do not.
    "search_r1_ppo": {
        **_SEARCH_R1,
        "advantage": "gae",
        "whiten": True,
        "kl_estimator": "k1",
        "kl_in": "reward",
        "value_clip": 0.5,
    },
    "search_r1_grpo": {**_SEARCH_R1},
    # Schulman et al. 2017, arXiv 1707.06347; advantages by arXiv 1506.02438.
    "ppo": {"advantage": "gae", "gae_lambda": 0.95, "whiten": True},
    # Shao et al. 2024, arXiv 2402.03300, eq. 3, with the lighter KL weight of search RL (theirs: .04).
    "grpo": {"averaging": "trajectory", "kl_coefficient": 0.001},
    # Liu et al. 2025, arXiv 2503.20783.
    "dr_grpo": {"advantage": "dr_grpo", "averaging": "constant"},
    # Yu et al. 2025, arXiv 2503.14476.
    "dapo": {"clip_high": 0.28, "dynamic_sampling_rounds": 10, "overlong_buffer": 0.2},
    # Zheng et al. 2025, arXiv 2507.18071: four mini-batches, bounds of section 5.1.
    "gspo": {
        "surrogate": "gspo",
        "averaging": "trajectory",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "updates_per_rollout": 4,
    },
    # MiniMax 2025, arXiv 2506.13585, eq. 4; the bound of ScaleRL (arXiv 2510.13786), a ratio of 5.
    "cispo": {"surrogate": "cispo", "clip_high": 4.0, "updates_per_rollout": 4},
    # Against collapse: LLDS with its action gate (arXiv 2512.04220), DPPO's mask (2602.04879), truncated
    # importance sampling, off-policy sequence masking and unbiased KL (2512.02556). The KL alone bounds what
    # many steps add up to.
    "stable": {
        "surrogate": "dppo",
        "llds_coefficient": 0.1,
        "importance": "token",
        "off_policy_threshold": 0.5,
        "kl_coefficient": 0.2,
        "kl_unbiased": True,
        "updates_per_rollout": 2,
    },
    # Ahmadian et al. 2024, arXiv 2402.14740.
    "rloo": {"advantage": "rloo", "surrogate": "reinforce", "averaging": "constant", "kl_in": "reward"},
    # Hu et al. 2025, arXiv 2501.03262.
    "reinforce_pp": {
        "advantage": "reinforce_pp",
        "whiten": True,
        "kl_coefficient": 0.001,
        "kl_estimator": "k1",
        "kl_in": "reward",
    },
}


def preset_fields(name: str) -> dict[str, Any]:
    """Every field of AlgorithmConfig but the recipe's, as the preset sets it. Raises ConfigError."""
    require(name in PRESETS, "preset", name, f"one of {', '.join(PRESETS)}")
    defaults = {f.name: f.default for f in fields(AlgorithmConfig) if f.default is not MISSING}
    return {key: value for key, value in {**defaults, **PRESETS[name]}.items() if key not in RECIPE_FIELDS}
