"""Rewards: functions of a finished trajectory, combined by weights.

They read what the agent found in the policy's own turns: its answer, its form, its searches. Neither
the prompt's example answer nor an answer inside a passage can score.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from agent.evaluation.judge import Judge, Verdict
from agent.evaluation.judge_config import JudgeConfig
from agent.evaluation.measures import GOLD_KEYS, gold_passages
from agent.trajectory import SegmentKind, Trajectory
from data.errors import ConfigError
from data.metrics.answers import METRICS, is_abstention
from data.objects.class_path import hints_of
from data.objects.plugins import find_plugin
from data.records import Question

if TYPE_CHECKING:
    from rl.algorithm.presets import AlgorithmConfig

RewardFunction = Callable[[Trajectory], float | list[float]]
"""One number for the outcome, paid on the last turn, or a list of one number a policy turn."""

_NAMED = inspect.Parameter.POSITIONAL_OR_KEYWORD


@dataclass(frozen=True)
class Reward:
    """The reward of a trajectory."""

    turns: list[float]
    """Weighted, one a policy turn; the reward of the outcome is on the last."""
    parts: dict[str, float]
    """By name, summed over the turns, without weights; rewards that failed are not among them."""
    error: str | None = None
    """The reason of a failure; the trajectory then stays out of the loss."""
    total: float = field(init=False)
    """The weighted sum."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", sum(self.turns))


def score_answer(metric: str, trajectory: Trajectory) -> float:
    """The answer by one of METRICS."""
    question = trajectory.question
    return METRICS[metric](trajectory.answer, question.gold_answers, question.normalizer)


def no_answer(trajectory: Trajectory) -> float:
    """-1.0 where the policy gave no answer, or an empty one, else 0.0."""
    return 0.0 if trajectory.answer else -1.0


def truth(trajectory: Trajectory) -> float:
    """1.0 for a right answer, 0.0 for "I don't know", -1.0 for a wrong one or none.

    TruthRL's reward (arXiv 2509.25760). Where hardly any answer is right it teaches silence: watch the share
    that is answered.
    """
    right = score_answer("em", trajectory)
    return right or (0.0 if is_abstention(trajectory.answer) else -1.0)


def search_cost(trajectory: Trajectory) -> list[float]:
    """-1.0 on each turn that searched; a search beyond the last turn allowed was none."""
    costs = [0.0] * count_turns(trajectory)
    for search in trajectory.searches:
        costs[search.turn] -= 1.0
    return costs


def gold_passage(trajectory: Trajectory) -> list[float]:
    """The share of the question's gold passages (GOLD_KEYS) that each turn's search was the first to find.

    Their sum is the recall of all searches; 0 throughout for a question that names no gold passage.
    """
    gold, field = gold_passages(trajectory.question)
    missing, shares = set(gold), [0.0] * count_turns(trajectory)
    for search in trajectory.searches:
        found = missing & {getattr(hit.passage, field) for hit in search.hits}
        shares[search.turn] += len(found) / max(len(gold), 1)
        missing -= found
    return shares


REWARDS: dict[str, RewardFunction] = {
    **{name: partial(score_answer, name) for name in METRICS},
    "format": lambda t: float(t.valid_format),
    "no_answer": no_answer,
    "truth": truth,
    "search_cost": search_cost,
    "gold_passage": gold_passage,
}
"""By name; besides these `judge`, which takes many trajectories at once and may fail."""
EXAMPLES = {
    name: f"examples.search_r1_scorer.scorer.{name}"
    for name in ("search_r1_legacy", "search_r1_legacy_format")
}
"""Names of functions that a checkout of the repository has."""


def combine(
    weights: Mapping[str, float], judge: JudgeConfig | None = None, cache: Path | None = None
) -> Callable[[Sequence[Trajectory]], list[Reward]]:
    """Return a function that rewards trajectories by the weighted sum of rewards.

    weights: by a name of REWARDS, "judge", or "module.function" of the user's own, a RewardFunction.
    cache: where the judge's verdicts are kept. Raises ConfigError: at once where a name is unknown or
    cannot be imported or the judge has no URL, and in use where a function returns no finite number.
    """
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise ConfigError(f"rewards.{name} = {weight}: must be a finite number")
    functions = {name: _find(name) for name in weights if name != "judge"}
    ask = Judge(judge or JudgeConfig(), cache) if "judge" in weights else None

    def reward(trajectories: Sequence[Trajectory]) -> list[Reward]:
        verdicts = ask(trajectories) if ask else [None] * len(trajectories)
        pairs = zip(trajectories, verdicts, strict=True)
        return [_weigh(trajectory, functions, weights, verdict) for trajectory, verdict in pairs]

    return reward


def check_questions(
    weights: Mapping[str, float], questions: Sequence[Question], algorithm: AlgorithmConfig | None = None
) -> None:
    """Raise ConfigError where gold passages are to be rewarded and no question names any."""
    needs = "rewards.gold_passage" if "gold_passage" in weights else ""
    if algorithm and algorithm.advantage == "search_credit" and algorithm.credit_potential != "answer_match":
        needs = f"algorithm.credit_potential = {algorithm.credit_potential!r}"
    if needs and not any([gold_passages(question)[0] for question in questions]):
        raise ConfigError(f"{needs}: no question's metadata has {', '.join(GOLD_KEYS)}")


def count_turns(trajectory: Trajectory) -> int:
    """Count the turns that the policy wrote."""
    return sum(segment.kind is SegmentKind.POLICY for segment in trajectory.segments)


def _weigh(
    trajectory: Trajectory,
    functions: Mapping[str, RewardFunction],
    weights: Mapping[str, float],
    verdict: Verdict | None,
) -> Reward:
    turns = count_turns(trajectory)
    results = {name: function(trajectory) for name, function in functions.items()}
    if isinstance(verdict, float):
        results["judge"] = verdict
    values = {name: _by_turn(name, result, turns) for name, result in results.items()}
    return Reward(
        turns=[sum(weights[name] * of[turn] for name, of in values.items()) for turn in range(turns)],
        parts={name: sum(of) for name, of in values.items()},
        error=verdict if isinstance(verdict, str) else None,
    )


def _by_turn(name: str, result: float | list[float], turns: int) -> list[float]:
    """One number a turn; an outcome stands on the last, and alone where there is no turn."""
    values = result if isinstance(result, list) else [0.0] * (turns - 1) + [result]
    for value in values:
        if not (isinstance(value, Real) and math.isfinite(value)):
            raise ConfigError(
                f"rewards.{name} returned {value!r}: must be a finite number, or a list of them"
            )
    if turns and len(values) != turns:
        raise ConfigError(
            f"rewards.{name} returned {len(values)} numbers for {turns} turns: must be one a turn"
        )
    return [float(value) for value in values]


def _find(name: str) -> RewardFunction:
    """The function of that name; a module of the user's own lies beside the recipe or where the command runs.

    What is called with a trajectory must take just that: classes and functions in C are refused, too.
    """
    if name in REWARDS:
        return REWARDS[name]
    if name in EXAMPLES:
        return find_plugin(EXAMPLES[name], f"rewards.{name}")
    place = f"rewards.{name}"
    if not {".", ":"} & set(name):
        known = ", ".join([*REWARDS, *EXAMPLES, "judge"])
        raise ConfigError(f"{place}: must be one of {known}, or module.function of your own")
    function = find_plugin(name.replace(":", "."), place)
    if not callable(function) or inspect.isclass(function) or inspect.isbuiltin(function):
        kind = "built-in function" if inspect.isbuiltin(function) else type(function).__name__
        kind = "class" if inspect.isclass(function) else kind
        raise ConfigError(f"{place}: is a {kind}, must be a Python function of one trajectory")
    parameters = list(inspect.signature(function).parameters.values())
    needed = [each for each in parameters if each.default is each.empty and each.kind is not each.VAR_KEYWORD]
    one = len(needed) == 1 and needed[0].kind in (inspect.Parameter.POSITIONAL_ONLY, _NAMED)
    takes = hints_of(function).get(needed[0].name, Trajectory) if one else None
    if takes not in (Trajectory, Any, object):
        signature = inspect.signature(function)
        raise ConfigError(f"{place}: takes {signature}, must be a Python function of one trajectory")
    return cast(RewardFunction, function)  # what it returns is checked when it is called
