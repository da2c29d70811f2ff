"""Watch a run's metrics for collapse, against the run's own first steps.

What it knows follows from the rows of metrics.jsonl alone, so a resumed run ends as the other would.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from rl.config import SentinelConfig


@dataclass(frozen=True)
class Verdict:
    """The judgement of one step."""

    alarms: list[str]
    """One line each: metric, value, bound and baseline."""
    action: Literal["warn", "stop", "roll_back", "preserve"] | None
    """None without alarms; more than warn only after `patience` alarmed steps in a row."""


@dataclass(frozen=True)
class _Check:
    key: str
    setting: str
    """Field of SentinelConfig."""
    bound: Callable[[float, float], float]
    """A function of the baseline and the setting."""
    is_ceiling: bool
    needs_baseline: bool = True


_CHECKS = (
    _Check("policy/entropy", "min_entropy_share", operator.mul, is_ceiling=False),
    _Check("policy/entropy", "max_entropy_share", operator.mul, is_ceiling=True),
    _Check("rollout/valid_format", "min_valid_share", operator.mul, is_ceiling=False),
    _Check("policy/correct_logprob", "max_correct_logprob_fall", operator.sub, is_ceiling=False),
    _Check("policy/grad_norm", "max_grad_norm_ratio", operator.mul, is_ceiling=True),
    _Check("policy/sampler_difference", "max_sampler_difference", lambda _, most: most, True, False),
)
_WATCHED = ("policy/loss", *dict.fromkeys(check.key for check in _CHECKS))


class Sentinel:
    """Judges step after step; `history` is what it would have watched before."""

    def __init__(self, config: SentinelConfig, history: Iterable[Mapping[str, Any]] = ()) -> None:
        self._config = config
        self._first: dict[str, list[float]] = {key: [] for key in _WATCHED}
        self._alarmed: set[str] = set()
        self._in_a_row = 0
        for row in history:
            self.watch(row["step"], row)

    def watch(self, step: int, metrics: Mapping[str, float | None]) -> Verdict:
        """Judge the metrics of one step; None, NaN and infinity are alarms, an absent key is not.

        A row that lacks the metric that alarmed last, such as that of an evaluation or of a step with
        nothing to learn, neither adds to the alarms in a row nor ends them.
        """
        alarms: list[tuple[str, str]] = []
        for key in _WATCHED:
            if key in metrics:
                alarms += [(key, f"step {step}: {line}") for line in self._judge(key, metrics[key])]
        if not alarms:
            if self._alarmed <= metrics.keys():
                self._in_a_row = 0
            return Verdict([], None)
        self._alarmed = {key for key, _ in alarms}
        self._in_a_row += 1
        due = self._in_a_row >= self._config.patience
        if due:
            self._in_a_row = 0
        return Verdict([line for _, line in alarms], self._config.action if due else "warn")

    def _judge(self, key: str, value: float | None) -> list[str]:
        """The alarms of one metric, and its value taken into the baseline while that is being made."""
        if value is None or not math.isfinite(value):
            return [f"{key} is {value}: not a finite number"]
        first = self._first[key]
        complete = len(first) >= self._config.baseline_steps
        if not complete and value != 0:  # zero is nothing to learn, or nothing yet: no measure of others
            first.append(value)
        baseline = median(first) if complete else math.nan
        return [
            line
            for check in _CHECKS
            if check.key == key and (complete or not check.needs_baseline)
            for line in self._compare(check, value, baseline)
        ]

    def _compare(self, check: _Check, value: float, baseline: float) -> list[str]:
        setting = getattr(self._config, check.setting)
        bound = check.bound(baseline, setting)
        if not (value > bound if check.is_ceiling else value < bound):
            return []
        side = "above" if check.is_ceiling else "below"
        of = f", baseline {baseline:.4g}" if check.needs_baseline else ""
        return [f"{check.key} {value:.4g} is {side} {bound:.4g} ({check.setting} {setting:g}{of})"]
