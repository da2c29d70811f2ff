"""Credit for what a turn made of the gold answer's likelihood under a frozen reference (TRACE, 2607.13988).

The reference reads copies of a trajectory, each cut before a turn and followed by the gold answer, of which
it scores the answer alone. The trajectory that is trained on never holds the answer that it is asked for.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from agent.trajectory import Ledger, Segment, SegmentKind, Trajectory
from rl.algorithm.advantages import permute
from rl.algorithm.presets import AnswerValue

if TYPE_CHECKING:
    from agent.protocol import Protocol
    from rl.algorithm.presets import AlgorithmConfig

WINDOW, DISCOUNT, TERMINAL, GAP = 3, 0.8, 2.0, 0.1
"""Constants of TRACE: turns that a turn is credited for, their discount, weight of the outcome, offset."""

VALUES: dict[AnswerValue, Callable[[float], float]] = {
    "log_ratio": lambda logprob: -math.log(GAP - min(logprob, 0.0)),
    "probability": math.exp,
    "logprob": lambda logprob: logprob,
}
"""The answer's mean log-prob -> the value of a state. log_ratio: TRACE's log(d_0 / d_t), d = .1 - log-prob,
less its constant; the others are IGPO's (arXiv 2510.14967)."""


def probes(
    trajectory: Trajectory, protocol: Protocol, encode: Callable[[str], list[int]]
) -> list[Trajectory]:
    """Return the trajectory cut before each turn, then the first gold answer, whose tokens alone are scored.

    Empty where the question has no gold answer.
    """
    golds, found = trajectory.question.gold_answers, []
    before, after = protocol.padding
    thought = f"<{protocol.think_tag}>{before}{after}</{protocol.think_tag}>"
    for place, segment in enumerate(trajectory.segments):
        if segment.kind is SegmentKind.POLICY and golds:
            read = Ledger(trajectory.segments[:place])
            opened = protocol.opens_thought(read.segments[-1].text)
            head = thought.removeprefix(f"<{protocol.think_tag}>" * opened) + f"<{protocol.answer_tag}>"
            answer = encode(f"{before}{golds[0]}{after}")
            pictures = tuple(read.pictures)
            context = Segment(SegmentKind.PROMPT, read.token_ids + encode(head), head, pictures=pictures)
            scored = Segment(SegmentKind.POLICY, answer, golds[0], [None] * len(answer))
            found.append(Trajectory(trajectory.question, [context, scored], trajectory.stop_reason))
    return found


def probe_key(probe: Trajectory) -> tuple[object, ...]:
    """Return what a probe's log-probs depend on: the same for the first turns of a whole group."""
    return (*probe.token_ids, *(picture.source for picture in probe.pictures))


def turn_gains(trajectory: Trajectory, logprobs: Sequence[float], value: AnswerValue) -> list[float]:
    """Return by how much each turn but the last raised the value; their sum is that of the last state less
    the first, but for turns that showed no new passage: what the reference makes of a repetition is no gain.
    """
    values = [VALUES[value](logprob) for logprob in logprobs]
    seen, new = set[str](), set[int]()
    for search in trajectory.searches:
        if fresh := {hit.passage.id for hit in search.hits} - seen:
            new.add(search.turn)
        seen |= fresh
    gains = [after - before for before, after in pairwise(values)]
    return [gain if turn in new else min(gain, 0.0) for turn, gain in enumerate(gains)]


def turn_credit(gains: Sequence[float], outcome: float) -> list[float]:
    """Return the credit of each turn but the last: the discounted mean of the gains of its window and, where
    that reaches the last turn, the discounted outcome.   gains [1, 0], outcome 0 -> [.556, 0]
    """
    found, last = [], len(gains)
    for turn in range(last):
        window = gains[turn : turn + WINDOW]
        weights = [DISCOUNT**step for step in range(len(window))]
        mean = sum(w * gain for w, gain in zip(weights, window, strict=True)) / sum(weights)
        reaches = turn + WINDOW > last
        found.append(mean + reaches * TERMINAL * DISCOUNT ** (last - turn) * outcome)
    return found


def answer_credit(
    trajectories: Sequence[Trajectory],
    turn_tokens: Sequence[Sequence[int]],
    group_size: int,
    algorithm: AlgorithmConfig,
    logprobs: Sequence[Sequence[float]],
    outcomes: Sequence[float],
    seed: int = 0,
) -> Tensor:
    """Return the credit of each trained token (N,): credit_weight x that of its turn; 0 in the last turn.

    logprobs: of the answer before each turn, by trajectory; outcomes: its advantage. With `credit_permuted`
    the gains of a group's n-th turns change hands at random.
    """
    pairs = zip(trajectories, logprobs, strict=True)
    gains = [turn_gains(trajectory, own, algorithm.answer_value) for trajectory, own in pairs]
    if algorithm.credit_permuted:
        most = max(map(len, gains), default=0)
        present = torch.tensor([[at < len(each) for at in range(most)] for each in gains], dtype=torch.bool)
        table = torch.tensor([each + [0.0] * (most - len(each)) for each in gains])
        permute(table, present, group_size, random.Random(f"{seed}/{trajectories[0].question.id}"))
        gains = [table[row, : len(each)].tolist() for row, each in enumerate(gains)]
    flat: list[float] = []
    for own, lengths, outcome in zip(gains, turn_tokens, outcomes, strict=True):
        credit = [*turn_credit(own, outcome), *[0.0] * (len(lengths) - len(own))]
        flat += [algorithm.credit_weight * c for c, n in zip(credit, lengths, strict=True) for _ in range(n)]
    return torch.tensor(flat)
