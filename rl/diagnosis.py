"""Say from a run's metrics why a policy has nothing to learn from, and what to do about it.

Pure functions over rows of metrics.jsonl; `sentinel.py` beside it watches for collapse instead.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from data.text import counted
from rl.config import TrainConfig

WINDOW = 5
"""Steps in a row that must agree before the run is said to learn nothing."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Obstacle:
    """The reason why nothing can be learned."""

    name: str
    seen: str
    """The sign of it in the metrics."""
    cause: str
    """The likeliest cause."""
    remedy: str
    """The next thing to do, with its command."""

    def __str__(self) -> str:
        return f"{self.seen}. Most likely {self.cause}. Next: {self.remedy}."


def find_obstacle(rows: Sequence[Row], config: TrainConfig, protocol: str) -> Obstacle | None:
    """The first thing that holds in all rows and leaves nothing to learn from; None where there is none.

    A metric that a row lacks holds nowhere. protocol: the name of the one that is spoken.
    """
    if all_are(rows, "rollout/valid_format", 0):
        return no_valid_format(rows, config.policy, protocol, config.out)
    if all_are(rows, "rollout/searches", 0) and config.retriever != "none":
        return Obstacle(
            "no search",
            "no trajectory searches",
            "the policy answers from memory, and no reward asks for more",
            f"{warm_start(config.policy, protocol, config.out)} shows it how; or reward what a search finds: "
            "--rewards '{em: 1.0, gold_passage: 0.5}' where questions name their gold passages",
        )
    if all_are(rows, "reward/mean", 0) and all_are(rows, "reward/group_std", 0):
        return _no_reward(rows, config, protocol)
    if config.algorithm.needs_groups and all_are(rows, "rollout/zero_variance_groups", 1):
        return _flat_groups(rows, config)
    if all_are(rows, "policy/grad_norm", 0):
        return Obstacle(
            "no gradient",
            "every gradient is 0",
            "all advantages are 0",
            "look at reward/* in metrics.jsonl, and at trajectories with --keep_rollouts_every 1",
        )
    return None


def all_are(rows: Sequence[Row], key: str, value: float) -> bool:
    """Return whether there are rows, and the metric has this value in each."""
    return bool(rows) and all(row.get(key) == value for row in rows)


def no_valid_format(rows: Sequence[Row], policy: str, protocol: str, out: str) -> Obstacle:
    """No trajectory ends with an answer in the form of the protocol."""
    teach = warm_start(policy, protocol, out)
    cause = "the policy has not learned to speak it"
    remedy = f"{teach}, and train what comes out; or another protocol (--protocol.name)"
    if _mean(rows, "stop/token_limit") >= 0.5:
        cause = "the context is full before an answer"
        remedy = f"a larger --protocol.max_context_tokens, or fewer passages (--protocol.top_k); or {teach}"
    elif _mean(rows, "rollout/searches") > 0 and _mean(rows, "rollout/invalid_actions") < 0.5:
        cause = "the policy searches until its turns are spent, and never answers"
        remedy = f"{teach}, or a larger --protocol.max_turns"
    return Obstacle(
        "no valid format",
        f"no trajectory is in the form of protocol {protocol} (valid format 0)",
        cause,
        remedy,
    )


def warm_start(policy: str, protocol: str, out: str) -> str:
    """The command that teaches a policy a protocol."""
    options = {"policy": policy, "protocol": protocol, "invented": 2000, "out": f"{out.rstrip('/')}-warm"}
    words = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in options.items())
    return f"`sleuth warm-start {words}`"


def _no_reward(rows: Sequence[Row], config: TrainConfig, protocol: str) -> Obstacle:
    seen, answered = f"every reward is 0 ({', '.join(config.rewards)})", _mean(rows, "stop/answered")
    if (right := _mean(rows, "rollout/em")) > 0:
        paid = "the rewards do not pay what is right"
        return Obstacle(
            "no reward", seen, f"{paid} (EM {right:.3f})", "other rewards (--rewards '{em: 1.0}')"
        )
    cause = "no answer matches its gold answers: too hard for this policy, or written otherwise"
    if answered < 0.5:
        cause = f"the policy does not come to an answer ({answered:.0%} of the trajectories do)"
    softer = "a softer reward (--rewards '{f1: 1.0}')"
    remedy = f"easier questions, {softer}, or {warm_start(config.policy, protocol, config.out)}"
    return Obstacle("no reward", seen, cause, remedy)


def _flat_groups(rows: Sequence[Row], config: TrainConfig) -> Obstacle:
    size = config.rollout.group_size
    seen = f"every group is flat: the {size} trajectories of a question all earn the same"
    more = f"--rollout.group_size {2 * size}, a higher --rollout.temperature"
    if all_are(rows, "rollout/em", 1):
        return Obstacle("solved", seen, "every answer is right by now", "harder questions")
    return Obstacle(
        "flat groups", seen, "they hardly differ, or the questions are too hard", f"{more}, or others"
    )


def _mean(rows: Sequence[Row], key: str) -> float:
    return fmean(row.get(key) or 0.0 for row in rows)


def conclude(rows: Sequence[Row], config: TrainConfig, protocol: str) -> str:
    """Describe a training that has ended in one line: what stood in its way, or what it changed."""
    steps = [row for row in rows if "reward/mean" in row]
    head = f"trained {counted(config.steps, 'step')}"
    if (obstacle := find_obstacle(steps, config, protocol)) is not None:
        return f"{head}, but nothing was learned: {obstacle}"
    parts = [head, *_change(steps, "reward/mean", "reward"), *_change(rows, "dev/em", "dev EM")]
    last = find_obstacle(steps[-WINDOW:], config, protocol)
    ending = f". In the last {min(WINDOW, len(steps))} steps {last}" if last is not None else ""
    return ", ".join(parts) + ending


def _change(rows: Sequence[Row], key: str, label: str) -> list[str]:
    """Return a metric's mean over its first and its last few values; nothing where it was never taken."""
    values = [row[key] for row in rows if row.get(key) is not None]
    if not values:
        return []
    few = max(1, min(WINDOW, len(values) // 2)) if key.startswith("reward") else 1
    return [f"{label} {fmean(values[:few]):.3f} -> {fmean(values[-few:]):.3f}"]
