"""Finds the runs and evaluations that a report is about: a run, an evaluation, or a folder of several."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import groupby
from pathlib import Path
from typing import Any

from agent.evaluation.compare import paired_difference, short_names
from agent.evaluation.records import MATRIX_FILE, brief, iterate_records
from agent.evaluation.scores import score
from data.errors import ConfigError, DataError
from data.jsonl import read_json
from data.run_dir import read_metrics, read_run
from data.text import counted


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: its name, its scores, and its records by question id without texts of passages."""

    name: str
    folder: Path
    scores: Mapping[str, Any]
    records: Mapping[str, Mapping[str, Any]]
    finished: bool


@dataclass(frozen=True)
class Run:
    """All that the report shows of a folder."""

    name: str
    kind: str
    """Run, evaluation or folder."""
    info: Mapping[str, Any]
    config: str
    metrics: Mapping[str, Sequence[Mapping[str, Any]]]
    """By name of the run; "" where the folder itself is one."""
    phases: Mapping[str, float]
    evaluations: Sequence[Evaluation]
    passed_over: Sequence[str] = ()
    """Names of evaluations on dev that are left out because there are so many."""
    matrix: Mapping[str, Any] | None = None


def read_folder(path: Path | str, names: str | None = None) -> Run:
    """Everything a folder holds, whatever is missing left empty.

    names: patterns of the evaluations that are wanted, with commas between; by default all, but of those on
    dev during a training only the first, the best and the last. Raises DataError where there is neither run
    nor evaluation, or a file is malformed; ConfigError where no evaluation has such a name.
    """
    path = Path(path)
    runs = sorted(file.parent for file in path.rglob("run.json"))
    folders = {_name(path, file.parent): file.parent for file in sorted(path.rglob("trajectories.jsonl"))}
    if not runs and not folders:
        raise DataError(f"{path} is no run folder and no evaluation, and holds none")
    wanted = _matching(list(folders), names) if names else _by_default(folders)
    matrix = read_json(path / MATRIX_FILE) if (path / MATRIX_FILE).exists() else None
    if matrix:  # the one that others are compared to first
        places = {name: place for place, name in enumerate([matrix["baseline"], *matrix["cells"]][::-1])}
        wanted.sort(key=lambda name: -places.get(name, -1))
    kind = "run" if path in runs else "evaluation" if list(folders.values()) == [path] else "folder"
    return Run(
        name=path.resolve().name,
        kind=kind,
        info=_info(path, kind, runs, len(folders)),
        config=_config(path, kind, runs),
        metrics={"" if run == path else _name(path, run): read_metrics(run) for run in runs},
        phases=_read_phases(path / "phases.json"),
        evaluations=[found for name in wanted if (found := _read(name, folders[name])) is not None],
        passed_over=[name for name in folders if name not in wanted],
        matrix=matrix,
    )


def read_folders(paths: Sequence[Path | str], names: str | None = None) -> Run:
    """Several folders side by side, each as `read_folder` reads it, with its name before those inside."""
    if len(paths) == 1:
        return read_folder(paths[0], names)
    prefixes = short_names([str(Path(path).resolve()) for path in paths])
    runs = [read_folder(path, names) for path in paths]
    named = list(zip(prefixes, runs, strict=True))

    def under(prefix: str, run: Run, name: str) -> str:
        return prefix if run.kind == "evaluation" else f"{prefix}/{name}".rstrip("/")

    return Run(
        name=" · ".join(prefixes),
        kind="comparison",
        info={"status": f"{len(runs)} folders"},
        config="\n".join(f"# {prefix}\n{run.config}" for prefix, run in named if run.config),
        metrics={under(p, run, name): rows for p, run in named for name, rows in run.metrics.items()},
        phases={},
        evaluations=[replace(e, name=under(p, run, e.name)) for p, run in named for e in run.evaluations],
        passed_over=[under(p, run, name) for p, run in named for name in run.passed_over],
    )


Compared = tuple[Evaluation, dict[str, dict[str, Any]]]
"""An evaluation, and the difference of others to it by their names."""


def compare(run: Run) -> Compared | str:
    """The pair `before` and `after`; or else the others less the first; or why there is no difference."""
    named = {evaluation.name: evaluation for evaluation in run.evaluations}
    chosen = [named[name] for name in ("before", "after") if name in named]
    first, *others = chosen if len(chosen) == 2 else run.evaluations
    if not others:
        return "A difference needs two evaluations."
    differences, reasons = {}, []
    for other in others:
        try:
            differences[other.name] = paired_difference(first.records.values(), other.records.values())
        except DataError as error:
            reasons.append(str(error))
    return (first, differences) if differences else f"No paired difference: {reasons[0]}."


def read_full(evaluation: Evaluation, ids: set[str]) -> dict[str, Mapping[str, Any]]:
    """The whole records of some questions."""
    return {record["id"]: record for record in iterate_records(evaluation.folder) if record["id"] in ids}


def _name(path: Path, folder: Path) -> str:
    """Return the name of an evaluation or run below `path`.   run1/evaluations/after -> run1/after"""
    parts = [part for part in folder.relative_to(path).parts if part not in ("evaluations", "cells")]
    return "/".join(parts) or path.resolve().name


def _matching(names: Sequence[str], patterns: str) -> list[str]:
    given = [pattern.strip() for pattern in patterns.split(",")]
    for pattern in given:
        if not any(fnmatch(name, pattern) for name in names):
            raise ConfigError(f"evaluations: none is called {pattern!r}; there are {', '.join(names)}")
    return [name for name in _in_order(names) if any(fnmatch(name, pattern) for pattern in given)]


def _by_default(folders: Mapping[str, Path]) -> list[str]:
    """All names, but of the evaluations on dev of each run only the first, the best and the last."""
    kept: list[str] = []
    for is_dev, group in groupby(_in_order(list(folders)), key=lambda name: _dev(name)):
        names = list(group)
        best = max(names, key=lambda name: _em(folders[name])) if is_dev else ""
        kept += [name for name in names if not is_dev or name in (names[0], best, names[-1])]
    return kept


def _in_order(names: Sequence[str]) -> list[str]:
    """Run by run: before, after, then by name, those on dev last."""
    first = {"before": 0, "after": 1}

    def key(name: str) -> tuple[Any, ...]:
        run, _, own = name.rpartition("/")
        return run, bool(_dev(name)), first.get(own, 2), own

    return sorted(names, key=key)


def _dev(name: str) -> str | None:
    """The run whose evaluation on dev has this name; None for other evaluations."""
    found = re.fullmatch(r"(.*?)/?dev-\d+", name)
    return f"{found[1]}/" if found else None


def _em(folder: Path) -> float:
    file = folder / "scores.json"
    return _scores(file)["em"]["mean"] if file.exists() else -1.0


def _scores(file: Path) -> dict[str, Any]:
    """Return what `sleuth evaluate` wrote there; DataError where it is something else."""
    match scores := read_json(file):
        case {"n": int(), "em": {"mean": _}, "f1": {"mean": _}, "by_kind": dict()}:
            return scores
        case _:
            raise DataError(
                f"{file}: holds no scores of `sleuth evaluate` (n, em, f1, by_kind); start that again"
            )


def _read(name: str, folder: Path) -> Evaluation | None:
    records = {record["id"]: brief(record) for record in iterate_records(folder)}
    file = folder / "scores.json"
    if file.exists():
        return Evaluation(name, folder, _scores(file), records, True)
    return Evaluation(name, folder, score(records.values()), records, False) if records else None


def _info(path: Path, kind: str, runs: Sequence[Path], evaluations: int) -> dict[str, Any]:
    if kind == "run":
        return read_run(path)
    if kind == "evaluation":
        return {"status": "finished" if (path / "scores.json").exists() else "unfinished"}
    return {"status": f"{counted(len(runs), 'run')}, {counted(evaluations, 'evaluation')}"}


def _config(path: Path, kind: str, runs: Sequence[Path]) -> str:
    files = {"": path / "config.yaml"} if kind == "run" else {"": path / "evaluation.json"}
    if kind == "folder":
        files = {_name(path, run): run / "config.yaml" for run in runs}
    found = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.exists()}
    return "\n".join(f"# {name}\n{text}" if name else text for name, text in found.items())


def _read_phases(path: Path) -> dict[str, float]:
    """{"seconds": {phase: seconds}}; {} where there is no such file."""
    if not path.exists():
        return {}
    try:
        seconds = read_json(path)["seconds"]
        return {str(phase): float(value) for phase, value in seconds.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f'{path}: must be {{"seconds": {{phase: seconds}}}}') from error
