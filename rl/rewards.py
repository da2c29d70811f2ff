"""Rewards: functions of a finished trajectory, combined by weights.

They read `Trajectory.answer` and the well-formedness that the agent found in policy-written turns.
Neither the prompt's example answer nor an answer inside a passage can score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from agent.trajectory import Trajectory
from data.answers import exact_match
from data.errors import ConfigError


def em(trajectory: Trajectory) -> float:
    """1.0 if the answer equals a gold answer after SQuAD normalisation, else 0.0; no answer is 0.0."""
    return float(exact_match(trajectory.answer, trajectory.question.gold_answers))


def format_reward(trajectory: Trajectory) -> float:
    """1.0 if every turn is one thought and one action and the last one answers, else 0.0."""
    return float(trajectory.valid_format)


REWARDS: dict[str, Callable[[Trajectory], float]] = {"em": em, "format": format_reward}


def combine(weights: Mapping[str, float]) -> Callable[[Trajectory], float]:
    """The weighted sum of the named rewards. Raises ConfigError naming those there are."""
    for name in weights:
        if name not in REWARDS:
            raise ConfigError(f"rewards.{name}: must be one of {', '.join(REWARDS)}")
    return lambda trajectory: sum(w * REWARDS[name](trajectory) for name, w in weights.items())
