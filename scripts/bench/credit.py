"""Credit and stability in the embedded world: arms of one recipe that differ in the fields named here alone.

    python -m scripts.bench.credit --experiment credit [--out runs/credit] [--seeds 3]
    python -m scripts.bench.credit --experiment stability [--out runs/credit]

A run is `sleuth train` from the seed policy with 8 questions x 8 trajectories a step. Its last step, never
its best, answers every third multi-hop test question greedily (no entity of theirs is in training).
Differences to the first arm are paired over questions and seeds, entities resampled. The same command goes on
where it stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from agent.evaluation.compare import compare
from agent.evaluation.records import read_records
from data.checkpoint import latest_checkpoint
from data.jsonl import read_jsonl, write_jsonl
from data.metrics.significance import format_estimate
from data.run_dir import read_metrics
from data.text import markdown_table
from rl.config import SentinelConfig
from rl.sentinel import Sentinel
from scripts.bench.algorithms import sleuth
from scripts.quickstart import RECIPE, build_world

Options = dict[str, Any]
CREDIT = {"steps": 16, "eval_every": 16, "algorithm.advantage": "search_credit"}
COLLAPSING = {"algorithm.learning_rate": 3e-3, "eval_every": 2}
ARMS: dict[str, dict[str, Options]] = {
    "credit": {
        "outcome": {**CREDIT, "algorithm.advantage": "grpo"},
        "coverage": CREDIT,
        "permuted": {**CREDIT, "algorithm.credit_permuted": True},
        "answer_match": {**CREDIT, "algorithm.credit_potential": "answer_match"},
    },
    "stability": {
        "plain": {**COLLAPSING, "algorithm.updates_per_rollout": 2, "steps": 12},
        "stable": {**COLLAPSING, "preset": "stable", "steps": 36, "eval_every": 4},
    },
}


def main(
    experiment: Literal["credit", "stability"],
    out: Path = Path("runs/credit"),
    seeds: int = 3,
    only: list[str] | None = None,
) -> None:
    """Train every arm of an experiment over seeds, and print its table.

    Args:
        experiment: Which.
        out: Folder of all runs.
        seeds: Seeds of each arm.
        only: Only these arms, the one first that the others are compared with.
    """
    build_world(out / "world")
    test = read_jsonl(out / "world" / "test.jsonl")
    multi_hop = [row for row in test if row["metadata"]["kind"] in ("two_hop", "three_hop")]
    write_jsonl(out / "test.jsonl", multi_hop[::3])
    write_jsonl(out / "dev.jsonl", list(read_jsonl(out / "world" / "dev.jsonl"))[::4])
    arms = {name: ARMS[experiment][name] for name in only or ARMS[experiment]}
    folders = {name: [out / f"{experiment}-{name}-{seed}" for seed in range(seeds)] for name in arms}
    for seed in range(seeds):
        for name, options in arms.items():
            run(out, folders[name][seed], {"seed": seed, **options})
    print(table(folders))


def run(out: Path, folder: Path, options: Options) -> None:
    """Train one arm with one seed and let it answer the test questions, as far as that is not done."""
    log, world = folder.with_suffix(".log"), out / "world"
    given = {"questions": world / "train.jsonl", "dev_questions": out / "dev.jsonl"}
    shared = {"retriever": world / "index", "out": folder, "rollout.questions_per_step": 8}
    sleuth("train", {"config": RECIPE, **given, **shared, **options}, log)
    last, test = latest_checkpoint(folder / "checkpoints"), folder / "evaluations" / "test"
    if last and not (test / "scores.json").exists():
        asked = {"policy": last.path, "questions": out / "test.jsonl", "retriever": world / "index"}
        sleuth("evaluate", {**asked, "out": test}, log)


def table(folders: dict[str, list[Path]]) -> str:
    """The arms as Markdown, the first one what the others are compared with."""
    records = {
        name: [
            {**record, "id": f"{seed}/{record['id']}"}
            for seed, folder in enumerate(of)
            for record in read_records(folder / "evaluations" / "test")
        ]
        for name, of in folders.items()
    }
    measures = compare(records)["measures"]
    columns = ("arm", "EM multi-hop", "less the first", "searches", "EM dev, best", "EM dev, last")
    rows = []
    for name, em, searches in zip(folders, measures["EM"], measures["searches"], strict=True):
        less = format_estimate(em["difference"], signed=True) if em["difference"] else ""
        rows.append((name, format_estimate(em), less, f"{searches['mean']:.2f}", *of_runs(folders[name])))
    return markdown_table((*columns, "alarmed steps", "credit's share of a step"), rows)


def of_runs(folders: list[Path]) -> tuple[str, ...]:
    """Read the metrics of an arm's runs, a number a seed."""
    cells: list[list[str]] = []
    for folder in folders:
        rows = read_metrics(folder)
        sentinel = Sentinel(SentinelConfig())
        alarms = sum(bool(sentinel.watch(row["step"], row).alarms) for row in rows)
        dev = [row["dev/em"] for row in rows if "dev/em" in row]
        steps = [row for row in rows if "time/step_seconds" in row]
        spent = sum(row.get("time/advantages_seconds", 0.0) for row in steps)
        share = spent / sum(row["time/step_seconds"] for row in steps)
        cells.append([f"{max(dev):.3f}", f"{dev[-1]:.3f}", str(alarms), f"{share:.3%}"])
    return tuple(" / ".join(column) for column in zip(*cells, strict=True))


if __name__ == "__main__":
    from scripts.__main__ import run_script

    run_script(main)
