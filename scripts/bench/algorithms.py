"""Every preset on the embedded world: steps and minutes to two-hop EM .5, and the final EM.

    python -m scripts.bench.algorithms [--out runs/algorithms] [--presets '[ppo, grpo]'] [--jobs 2]

A run is `sleuth train --config scripts/configs/atlas.yaml --preset NAME`: the packaged policy `atlas`, the
recipe's batch and learning rates. Runs are processes of one thread, `jobs` at a time; the same
command again goes on where it stopped. Needs matplotlib (`pip install '.[bench]'`).

The curve and `to .5` are greedy EM on the 240 two-hop questions of dev, `to .5` the first evaluation (one in
`eval_every` steps) that reaches it; minutes are those of the training steps up to there, evaluations left
out. Final EM is that of the last step, never of the best, on all 1,300 test questions. Neither set shares an
entity with the training questions (docs/atlas.md). Minutes grow where runs share the cores.

    OUT/world/  OUT/start/ (the policy before training)  OUT/PRESET-SEED/ (a run)  OUT/PRESET-SEED.log
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

from agent.evaluation.compare import paired_difference
from agent.evaluation.records import read_records
from data.checkpoint import latest_checkpoint
from data.errors import ConfigError, RunStopped
from data.jsonl import read_json, read_jsonl, write_jsonl
from data.metrics.significance import format_estimate
from data.run_dir import read_metrics
from rl.algorithm.presets import PRESETS
from scripts.quickstart import RECIPE, build_world

KIND = "two_hop"
GOAL = 0.5
MORE_SEEDS = {"ppo": 3, "grpo": 3}
"""Presets of more than one seed."""

INK, MUTED, GREY, GRID, ACCENT = "#1f2328", "#6b7280", "#cbd0d8", "#eceff3", "#1d4ed8"
COLUMNS = 5

Curve = dict[int, float]
"""Step -> two-hop EM on dev."""


@dataclass(frozen=True)
class Run:
    """One training run of a preset, and where it lies."""

    preset: str
    seed: int
    out: Path

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.out / f"{self.preset}-{self.seed}"

    @property
    def test(self) -> Path:
        """The evaluation of the last step."""
        return self.folder / "evaluations" / "test"

    def curve(self) -> Curve:
        """Every evaluation; step 0 is the starting policy."""
        folders = {0: self.out / "start" / "dev"}
        for folder in sorted((self.folder / "evaluations").glob("dev-*")):
            folders[int(folder.name.removeprefix("dev-"))] = folder
        scores = {step: read_json(folder / "scores.json") for step, folder in folders.items()}
        return {step: score["by_kind"][KIND]["em"]["mean"] for step, score in scores.items()}

    def reached(self) -> int | None:
        """The step of the first evaluation at GOAL, or None."""
        return next((step for step, em in self.curve().items() if em >= GOAL), None)

    def minutes(self, last: float = float("inf")) -> float:
        """Return the seconds of its training steps up to `last`, without evaluations."""
        rows = read_metrics(self.folder)
        return sum(row.get("time/step_seconds", 0.0) for row in rows if row["step"] <= last) / 60


def main(
    out: str = "runs/algorithms",
    presets: list[str] | None = None,
    jobs: int = 2,
    steps: int | None = None,
    eval_every: int = 5,
    thin: int = 1,
    plot: str = "docs/algorithms.svg",
) -> None:
    """Train presets on the embedded world, and write their table to stdout and their plot to a file.

    Args:
        out: Folder of all runs.
        presets: Which; none: all.
        jobs: Runs at once, one thread each; 0 trains none and shows what is there.
        steps: Training steps; none: those of the recipe.
        eval_every: Steps between evaluations on dev.
        thin: Ask only every so many-th dev and test question: to try the script.
        plot: SVG file.
    """
    for name in presets or ():
        if name not in PRESETS:
            raise ConfigError(f"presets: {name!r} is none of {', '.join(PRESETS)}")
    folder = Path(out)
    build_world(folder / "world")
    for split in ("dev", "test"):
        rows = read_jsonl(folder / "world" / f"{split}.jsonl")
        asked = [row for row in rows if split == "test" or row["metadata"]["kind"] == KIND][::thin]
        write_jsonl(folder / f"{split}.jsonl", asked)
        evaluate("atlas", folder, split, folder / "start" / split, folder / "start.log")
    runs = [Run(p, seed, folder) for p in presets or PRESETS for seed in range(MORE_SEEDS.get(p, 1))]
    with ThreadPoolExecutor(jobs or 1) as pool:
        errors = list(pool.map(lambda run: attempt(run, steps, eval_every), runs if jobs else ()))
    done = [run for run in runs if (run.test / "scores.json").exists()]
    if done:
        print(table(done))
        draw(done, Path(plot))
    if any(errors):
        sys.exit("\n".join(error for error in errors if error))


# ---- running ---------------------------------------------------------------------------------------


def attempt(run: Run, steps: int | None, eval_every: int) -> str | None:
    """Train and test one run, as far as that is not done; what went wrong, or None."""
    options: dict[str, Any] = {
        "config": RECIPE,
        "preset": run.preset,
        "seed": run.seed,
        "questions": run.out / "world" / "train.jsonl",
        "dev_questions": run.out / "dev.jsonl",
        "retriever": run.out / "world" / "index",
        "out": run.folder,
        "eval_every": eval_every,
        **({} if steps is None else {"steps": steps}),
    }
    log = run.out / f"{run.folder.name}.log"
    try:
        sleuth("train", options, log)  # nothing where it is finished, an error where it is another run
        last = latest_checkpoint(run.folder / "checkpoints")
        assert last is not None, "training ends with a checkpoint"
        evaluate(str(last.path), run.out, "test", run.test, log)
    except RunStopped as error:
        return str(error)
    return None


def evaluate(policy: str, out: Path, split: str, into: Path, log: Path) -> None:
    """Greedy evaluation of a policy on the questions of `split`, unless it is there."""
    if not (into / "scores.json").exists():
        asked = {"questions": out / f"{split}.jsonl", "retriever": out / "world" / "index"}
        sleuth("evaluate", {"policy": policy, **asked, "out": into}, log)


def sleuth(command: str, options: dict[str, Any], log: Path) -> None:
    """Run one command in a process of one thread; RunStopped with its last line where it fails."""
    print(f"{command} {options['out']}", file=sys.stderr, flush=True)
    argv = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    with log.open("a") as file:
        one_thread = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        status = subprocess.run(
            [sys.executable, "-m", "scripts", command, *argv],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=one_thread,
        ).returncode
    if status:
        lines = log.read_text().splitlines() or [""]
        raise RunStopped(f"{command} {options['out']}: exit status {status}, {lines[-1]} (see {log})")


# ---- showing ---------------------------------------------------------------------------------------


def table(runs: Sequence[Run]) -> str:
    """The results as Markdown, the starting policy first."""
    start = runs[0].out / "start" / "test"
    head = ("preset", "seed", "steps", "steps to .5", "minutes to .5", "minutes", "EM two-hop", "EM all")
    rows = [[*head, "difference, all", "searches", "valid format"], ["---", *["---:"] * 10]]
    rows.append(["start", *[""] * 5, *final_cells(start, start)])
    for run in runs:
        step = run.reached()
        to_goal = ("never", "") if step is None else (str(step), f"{run.minutes(step):.1f}")
        trained = [f"{run.minutes():.1f}", *final_cells(run.test, start)]
        rows.append([run.preset, str(run.seed), str(max(run.curve())), *to_goal, *trained])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def final_cells(folder: Path, start: Path) -> list[str]:
    """The cells of an evaluation on the test questions; intervals are of 95 %, over entities."""
    scores = read_json(folder / "scores.json")
    difference = paired_difference(read_records(start), read_records(folder))["em"]
    return [
        format_estimate(scores["by_kind"][KIND]["em"]),
        format_estimate(scores["em"]),
        "" if folder == start else format_estimate(difference),
        f"{scores['searches_per_question']:.2f}",
        f"{scores['valid_format_rate']:.3f}",
    ]


def draw(runs: Sequence[Run], path: Path) -> None:
    """One panel a preset, the other presets in grey; of several seeds the median and the range."""
    plt = import_module("matplotlib.pyplot")  # of the extra `bench`
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "sleuth", "font.size": 9, "text.color": INK})
    curves: dict[str, list[Curve]] = {}
    for run in runs:
        curves.setdefault(run.preset, []).append(run.curve())
    middles = {name: [over_seeds(own, median)] for name, own in curves.items()}
    columns = min(COLUMNS, len(curves))
    rows = -(-len(curves) // columns)
    size = (2.1 * columns + 0.5, 2.0 * rows + 0.4)
    style = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(rows, columns, figsize=size, **style)
    for axis in axes.flat[len(curves) :]:
        axis.set_visible(False)
    for axis, (name, own) in zip(axes.flat, curves.items(), strict=False):
        for (other,) in middles.values():
            axis.plot(list(other), list(other.values()), color=GREY, linewidth=0.8)
        panel(axis, name, own)
    figure.supylabel("two-hop EM on dev (held-out entities)", fontsize=9, color=MUTED)
    figure.supxlabel("training step", fontsize=9, color=MUTED)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white", metadata={"Date": None})


def over_seeds(curves: Sequence[Curve], reduce: Callable[[list[float]], float]) -> Curve:
    """One curve of several, over the steps that all have."""
    steps = sorted(set.intersection(*map(set, curves)))
    return {step: reduce([curve[step] for curve in curves]) for step in steps}


def panel(axis: Any, name: str, curves: Sequence[Curve]) -> None:
    """The curves of one preset, its end labelled."""
    middle = over_seeds(curves, median)
    steps, last = list(middle), max(middle)
    low, high = (list(over_seeds(curves, reduce).values()) for reduce in (min, max))
    axis.fill_between(steps, low, high, color=ACCENT, alpha=0.18, linewidth=0)
    axis.plot(
        steps, list(middle.values()), color=ACCENT, linewidth=1.8, marker="o", markevery=[-1], markersize=4
    )
    label = f"{middle[last]:.2f}".removeprefix("0")
    place = {"textcoords": "offset points", "va": "center", "color": ACCENT}
    axis.annotate(label, (last, middle[last]), (5, 0), **place)
    axis.axhline(GOAL, color=MUTED, linewidth=0.7, linestyle=(0, (4, 3)))
    seeds = f", {len(curves)} seeds" if len(curves) > 1 else ""
    axis.set_title(name + seeds, loc="left", fontsize=9.5, fontweight="bold", pad=4)
    axis.set(ylim=(0, 1), xlim=(0, last * 1.2))
    axis.set_yticks((0, 0.25, 0.5, 0.75, 1), ("0", "", ".5", "", "1"))
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, labelsize=8, labelcolor=MUTED)


if __name__ == "__main__":
    from scripts.__main__ import run_script

    run_script(main)
