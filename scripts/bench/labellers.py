"""Labels of searches against the gold passages: precision and recall of positives, AUC of scores.

    python -m scripts.bench.labellers --trajectories FILE [--scores FILE]

Counted are the passages that searches showed, of questions that name their gold passages. A labeller says
positive or not; redundant counts as positive: useful, though not new. AUC is over the passages with a score:
how often a gold one has the higher score than another (half where they are equal). Chance is .5.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from rl.co_training.labels import LABELLERS, SCORED, Label, label
from rl.co_training.searches import Searches, read_searches

USEFUL = (Label.POSITIVE, Label.REDUNDANT)


def main(trajectories: Path, scores: Path | None = None) -> None:
    """Print a line of Markdown for each labeller.

    Args:
        trajectories: Trajectories of an agent on questions that name their gold passages.
        scores: Scores of their searches, by `sleuth score-searches`.
    """
    read = list(read_searches(trajectories, scores))
    known = {name for each in read for call in each.calls for of in call.scores.values() for name in of}
    print("| labels | passages | gold | positive | precision | recall | AUC |\n|---|---|---|---|---|---|---|")
    for name in LABELLERS:
        if name != "gold" and set(SCORED.get(name, ())) <= known:
            print(_line(name, read))
    if "alone" in known:
        print(f"| `alone` (score) | | | | | | {auc(*_scores('alone', read)):.3f} |")


def _line(name: str, read: Iterable[Searches]) -> str:
    pairs = [
        (truth[id_] in USEFUL, found.get(id_) in USEFUL)
        for each in read
        for truth, found in zip(label(each, "gold"), label(each, name), strict=True)
        for id_ in truth
        if truth[id_] is not Label.UNKNOWN
    ]
    gold, positive = (sum(side) for side in zip(*pairs, strict=True))
    both = sum(g and p for g, p in pairs)
    area = f"{auc(*_scores(name, read)):.3f}" if name in SCORED and len(SCORED[name]) == 1 else ""
    precision, recall = (f"{both / of:.3f}" if of else "" for of in (positive, gold))
    return f"| `{name}` | {len(pairs):,} | {gold:,} | {positive:,} | {precision} | {recall} | {area} |"


def _scores(name: str, read: Iterable[Searches]) -> tuple[np.ndarray, np.ndarray]:
    """The scores of gold passages and of others that searches showed."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for each in read:
        for call, truth in zip(each.calls, label(each, "gold"), strict=True):
            for id_, kind in truth.items():
                if kind is not Label.UNKNOWN and name in (of := call.scores.get(id_, {})):
                    found[kind in USEFUL].append(of[name])
    return np.array(found[True]), np.array(found[False])


def auc(gold: np.ndarray, others: np.ndarray) -> float:
    """Share of pairs in which the gold one scores higher, half of the ties.   [2, 1], [1] -> .75"""
    if not len(gold) or not len(others):
        return float("nan")
    return float(((gold[:, None] > others) + 0.5 * (gold[:, None] == others)).mean())


if __name__ == "__main__":
    from scripts.__main__ import run_script

    run_script(main)
