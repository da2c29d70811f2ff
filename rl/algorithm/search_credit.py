"""Credit for what each search was the first to find, on the tokens of its query (arXiv 2610.10179).

A potential says how much of the evidence a trajectory has after each of its searches; a search earns what it
raised it by. That is compared within the group, with what the others earned by the search of the same number,
and paid to the tokens of the query alone. The advantage of the outcome stays on all tokens.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from agent.evaluation.measures import GOLD_KEYS, gold_passages
from agent.trajectory import SearchRecord, SegmentKind, Trajectory
from data.formats.rows import ids_of
from data.metrics.answers import cover_em
from data.records import Question
from rl.algorithm.advantages import against_group, permute
from rl.algorithm.presets import Potential

if TYPE_CHECKING:
    from rl.algorithm.presets import AlgorithmConfig

Decode = Callable[[list[int]], str]


def coverage(question: Question, searches: Sequence[SearchRecord]) -> float:
    """Share of the question's gold passages that these searches found; 0 where it names none."""
    gold, found = _found(question, searches)
    return sum(found) / len(gold) if gold else 0.0


def coverage_ordered(question: Question, searches: Sequence[SearchRecord]) -> float:
    """The same, where a passage counts once all that the question names before it were found.

    Both passages of a comparison are named in the question: there the order means nothing.
    """
    gold, found = _found(question, searches)
    if question.metadata.get("kind") == "comparison" or all(found):
        return coverage(question, searches)
    return found.index(False) / len(gold)


def answer_match(question: Question, searches: Sequence[SearchRecord]) -> float:
    """1 once a passage that was found contains a gold answer; needs no names of gold passages."""
    texts = (f"{hit.passage.title}\n{hit.passage.text}" for search in searches for hit in search.hits)
    return max((cover_em(text, question.gold_answers, question.normalizer) for text in texts), default=0.0)


POTENTIALS: dict[Potential, Callable[[Question, Sequence[SearchRecord]], float]] = {
    "coverage": coverage,
    "coverage_ordered": coverage_ordered,
    "answer_match": answer_match,
}
"""(question, the searches so far) -> in [0, 1], never less after one more search."""


def events(trajectory: Trajectory, potential: Potential) -> list[float]:
    """Return by how much each search raised the potential; their sum is that of all searches."""
    phi, searches = POTENTIALS[potential], trajectory.searches
    after = [phi(trajectory.question, searches[:end]) for end in range(len(searches) + 1)]
    return [max(0.0, now - before) for before, now in pairwise(after)]


def search_credit(
    trajectories: Sequence[Trajectory],
    turn_tokens: Sequence[Sequence[int]],
    group_size: int,
    algorithm: AlgorithmConfig,
    decode: Decode,
    seed: int = 0,
) -> Tensor:
    """Return the credit of each trained token (N,): weight x z x L / |Q| on the |Q| tokens of a query.

    z: its event against those of the group at the same search, over their spread; 0 where fewer than two of
    the group searched so often, or all earned the same. L: trained tokens of the turn. With
    `credit_permuted` the events of a group's n-th searches change hands at random: a control.
    """
    earned = [events(trajectory, algorithm.credit_potential) for trajectory in trajectories]
    most = max(map(len, earned), default=0)
    present = torch.tensor([[at < len(each) for at in range(most)] for each in earned], dtype=torch.bool)
    found = torch.tensor([each + [0.0] * (most - len(each)) for each in earned])
    if algorithm.credit_permuted:
        permute(found, present, group_size, random.Random(f"{seed}/{trajectories[0].question.id}"))
    credits = [torch.zeros(sum(counts)) for counts in turn_tokens]
    if not most:
        return torch.cat([torch.empty(0), *credits])
    compared = against_group(found, present, group_size)  # (B, searches)
    for row, trajectory in enumerate(trajectories):
        turns = [s for s in trajectory.segments if s.kind is SegmentKind.POLICY]
        for at, search in enumerate(trajectory.searches):
            if compared[row, at]:
                first = sum(turn_tokens[row][: search.turn])
                start, end = query_span(turns[search.turn].token_ids, search.query, decode)
                mass = turn_tokens[row][search.turn] / (end - start)
                credits[row][first + start : first + end] = algorithm.credit_weight * mass * compared[row, at]
    return torch.cat(credits)


def query_span(token_ids: list[int], query: str, decode: Decode) -> tuple[int, int]:
    """Return where a query is written among the tokens of its turn; the whole turn, where it is not found.

    It is looked for from the end, for a thought may say it, too; one in JSON may be written otherwise.
    """
    start = decode(token_ids).rfind(query) if query else -1
    if start < 0:
        return 0, len(token_ids)
    # Each token by the first prefix of the turn that is longer than the place of a character in it.
    ends = range(1, len(token_ids) + 1)
    first, last = (
        bisect_right(ends, place, key=lambda end: len(decode(token_ids[:end])))
        for place in (start, start + len(query) - 1)
    )
    return first, min(last + 1, len(token_ids))


def _found(question: Question, searches: Sequence[SearchRecord]) -> tuple[list[str], list[bool]]:
    """The question's gold passages in its order, and which of them these searches found."""
    names, field = gold_passages(question)
    order = [name for key in GOLD_KEYS for name in ids_of(question.metadata.get(key), key)]
    gold = sorted(names, key=order.index)
    seen = {getattr(hit.passage, field) for search in searches for hit in search.hits}
    return gold, [name in seen for name in gold]
