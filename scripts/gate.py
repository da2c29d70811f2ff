"""`sleuth gate`: whether a new retriever may take the place of the old one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from data.errors import require
from data.jsonl import write_json
from data.questions import load_questions

REFUSED = 3
"""Exit status of a refusal."""


def main(
    trajectories: str,
    old: str,
    new: str,
    questions: str | None = None,
    normalizer: Literal["squad", "unicode", "unicode_folded"] | None = None,
    k: int = 3,
    max_plain_loss: float = 0.01,
    out: str | None = None,
) -> int:
    """Compare two retrievers on a policy's held-out searches and on plain questions.

    Exits with 0 where the new one may serve, with 3 where it is refused.

    Args:
        trajectories: Trajectories of the present policy on held-out questions (`sleuth evaluate`).
        old: Retriever that serves now: folder of an index, URL or YAML file.
        new: Retriever that would take its place.
        questions: Questions that, asked as they stand, may lose little.
        normalizer: Normal form of their answers: squad, or unicode for scripts without spaces; none: as each
            question's metadata say, else squad.
        k: Passages that a search shows.
        max_plain_loss: Most that plain questions may lose.
        out: File for the decision, as JSON.
    """
    from data.metrics.significance import format_estimate
    from retriever_server.open_retriever import check_retriever, open_retriever
    from rl.co_training.gate import judge_retrievers, read_asked

    require(k >= 1, "k", k, ">= 1")
    require(not (out and Path(out).is_dir()), "out", out, "a file, not a folder")
    for spec in (old, new):
        check_retriever(spec)
    searches = list(read_asked(trajectories))
    asked = load_questions(questions, normalizer=normalizer) if questions else []
    decision = judge_retrievers(searches, asked, open_retriever(old), open_retriever(new), k, max_plain_loss)
    if out:
        write_json(out, decision.as_record())
    change = f"{decision.old_found:.3f} -> {decision.new_found:.3f}, {format_estimate(decision.gain)}"
    print(f"share of {decision.searches:,} searches that find something at {k}: {change}")
    if decision.plain:
        print(f"plain questions, difference: {format_estimate(decision.plain)}")
    print(f"{'passed' if decision.passed else 'refused'}: {decision.reason}")
    return 0 if decision.passed else REFUSED
