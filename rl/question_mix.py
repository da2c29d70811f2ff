"""The questions of a run, one after another: the number-th depends on seed and configuration alone."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from data.errors import ConfigError

if TYPE_CHECKING:
    from data.records import Question
    from rl.config import RolloutConfig, TrainConfig


class QuestionMix:
    """Draws from all questions alike, or by the weights that the configuration gives their kinds."""

    def __init__(self, questions: Sequence[Question], config: TrainConfig) -> None:
        rollout = config.rollout
        self.questions, self.seed = questions, config.seed
        self.first = _shares(rollout.kind_weights)
        self.last = _shares(rollout.last_kind_weights) or self.first
        self.count = config.steps * rollout.questions_per_step
        self.of_kind = _by_kind(questions) if self.first else {}

    def draw(self, number: int) -> Question:
        """Return the number-th question of the run."""
        if not self.first:
            return draw_question(self.questions, number, self.seed)
        past = min(1.0, number / self.count)
        weights = [
            (1 - past) * self.first.get(kind, 0.0) + past * self.last.get(kind, 0.0) for kind in self.of_kind
        ]
        (kind,) = random.Random(f"{self.seed}/kind/{number}").choices(list(self.of_kind), weights)
        return draw_question(self.of_kind[kind], number, self.seed)


def draw_question(questions: Sequence[Question], number: int, seed: int) -> Question:
    """Return the number-th question of a run: a new order every epoch, which depends on the seed alone."""
    epoch, index = divmod(number, len(questions))
    return questions[_order(len(questions), f"{seed}/{epoch}")[index]]


def check_kinds(rollout: RolloutConfig, questions: Sequence[Question]) -> None:
    """Raise ConfigError where weights name a kind that no question is of."""
    for name in ("kind_weights", "last_kind_weights"):
        weights: Mapping[str, float] = getattr(rollout, name)
        unknown = [kind for kind in weights if kind not in (there := _by_kind(questions))]
        if unknown:
            raise ConfigError(
                f"rollout.{name} = {dict(weights)}: no question is of kind {', '.join(unknown)}; "
                f"their metadata.kind is {', '.join(sorted(there)) or 'nowhere given'}"
            )


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    return {kind: weight / sum(weights.values()) for kind, weight in weights.items()}


def _by_kind(questions: Sequence[Question]) -> dict[str, list[Question]]:
    found: dict[str, list[Question]] = {}
    for question in questions:
        if kind := question.metadata.get("kind"):
            found.setdefault(str(kind), []).append(question)
    return found


@lru_cache(maxsize=64)
def _order(count: int, key: str) -> list[int]:
    return random.Random(key).sample(range(count), count)
