"""A matrix of evaluations: policies x retrievers x passages x searches, with paired differences.

Every cell answered the same questions, so all that is said of cells are means over questions of weighted sums
of their scores: a difference to a baseline, the effect of a policy, an interaction. Their intervals resample
the clusters of the questions.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from agent.evaluation.records import (
    MATRIX_FILE,
    brief,
    check_same,
    clusters_of,
    iterate_records,
    question_of,
    verdict_of,
)
from data.atomic import atomic_write, open_atomic
from data.jsonl import write_json
from data.metrics.significance import estimate, format_estimate
from data.text import markdown_table


class Cell(NamedTuple):
    """A policy with a retriever, and the limits of its protocol; None: the policy's own."""

    policy: str
    retriever: str
    top_k: int | None = None
    searches: int | None = None

    @property
    def name(self) -> str:
        limits = {"k": self.top_k, "s": self.searches}
        told = [f"{key}{value}" for key, value in limits.items() if value is not None]
        return ".".join((self.policy, self.retriever, *told))


Weights = Mapping[Cell, float]
"""Scores of a question that are added up."""


def read_matrix(
    folders: Mapping[Cell, Path], baseline: Cell | None = None, diagonal: bool = False
) -> dict[str, Any]:
    """Estimates of all cells and of the contrasts that the matrix allows; what matrix.json holds.

    A question counts with the mean over its samples, right where the judge says so, else by exact match.
    Raises DataError where cells hold other questions.
    """
    scores, clusters = _scores(folders)
    cells = list(folders)
    wanted = {cell.name: {cell: 1.0} for cell in cells}
    less = {cell.name: {cell: 1.0, baseline: -1.0} for cell in cells if baseline and cell != baseline}
    told = _contrasts(cells, diagonal)
    columns = [_column(scores, weights) for weights in (*wanted.values(), *less.values(), *told.values())]
    found = iter(estimate(np.column_stack(columns), clusters))
    rows = {name: {**cell._asdict(), "em": next(found)} for name, cell in zip(wanted, cells, strict=True)}
    for name in less:
        rows[name]["difference"] = next(found)
    return {
        "format_version": 1,
        "n": len(clusters),
        "clusters": len(set(clusters)),
        "baseline": baseline and baseline.name,
        "cells": rows,
        "contrasts": {name: next(found) for name in told},
    }


def _scores(folders: Mapping[Cell, Path]) -> tuple[dict[Cell, np.ndarray], list[str]]:
    """Scores of each cell (N,) in one order of questions, and their clusters."""
    by_cell: dict[Cell, dict[str, list[float]]] = {}
    first: dict[str, Any] = {}
    for cell, folder in folders.items():
        own = by_cell.setdefault(cell, {})
        for record in map(brief, iterate_records(folder)):
            own.setdefault(question_of(record), []).append(verdict_of(record))
            first.setdefault(question_of(record), record)
    names = [cell.name for cell in folders]
    for cell in folders:
        check_same(set(next(iter(by_cell.values()))), set(by_cell[cell]), names[0], cell.name)
    ids = list(next(iter(by_cell.values())))
    means = {cell: np.array([np.mean(own[id_]) for id_ in ids]) for cell, own in by_cell.items()}
    return means, clusters_of(first[id_] for id_ in ids)


def _column(scores: Mapping[Cell, np.ndarray], weights: Weights) -> np.ndarray:
    return np.sum([weight * scores[cell] for cell, weight in weights.items()], axis=0)


def _contrasts(cells: Sequence[Cell], diagonal: bool) -> dict[str, Weights]:
    """Effects and interaction of two policies and two retrievers, and the diagonal; by limits."""
    policies = list(dict.fromkeys(cell.policy for cell in cells))
    retrievers = list(dict.fromkeys(cell.retriever for cell in cells))
    found: dict[str, Weights] = {}
    for limits in dict.fromkeys(cell[2:] for cell in cells):
        at = f" at {Cell('', '', *limits).name.strip('.')}" if limits != (None, None) else ""
        if len(policies) == len(retrievers) == 2:
            pairs = product(enumerate(policies), enumerate(retrievers))
            signs = {Cell(p, r, *limits): (i, j) for (i, p), (j, r) in pairs}
            ends = f"{policies[1]} less {policies[0]}", f"{retrievers[1]} less {retrievers[0]}"
            found[f"policy{at}: {ends[0]}"] = {cell: i - 0.5 for cell, (i, _) in signs.items()}
            found[f"retriever{at}: {ends[1]}"] = {cell: j - 0.5 for cell, (_, j) in signs.items()}
            found[f"interaction{at}"] = {cell: (2 * i - 1) * (2 * j - 1) for cell, (i, j) in signs.items()}
        if diagonal:
            size = len(policies)
            found[f"diagonal less the rest{at}"] = {
                Cell(p, r, *limits): 1 / size if i == j else -1 / (size * (size - 1))
                for i, p in enumerate(policies)
                for j, r in enumerate(retrievers)
            }
    return found


def table(matrix: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of the cells for people."""
    columns = ("policy", "retriever", "passages", "searches", "EM [95 %]", "less the baseline")
    rows = []
    for name, cell in matrix["cells"].items():
        limits = ("" if cell[key] is None else str(cell[key]) for key in ("top_k", "searches"))
        less = format_estimate(cell["difference"], signed=True) if "difference" in cell else ""
        less = "baseline" if name == matrix["baseline"] else less
        rows.append((cell["policy"], cell["retriever"], *limits, format_estimate(cell["em"]), less))
    return columns, rows


def contrast_table(matrix: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, str]]]:
    """Columns and rows of the contrasts for people."""
    rows = [(name, format_estimate(found, signed=True)) for name, found in matrix["contrasts"].items()]
    return ("contrast", "EM [95 %]"), rows


def write_matrix(out: Path, matrix: Mapping[str, Any]) -> None:
    """Write matrix.json, matrix.md and matrix.csv."""
    write_json(out / MATRIX_FILE, matrix)
    text = markdown_table(*table(matrix))
    if matrix["contrasts"]:
        text += "\n" + markdown_table(*contrast_table(matrix))
    atomic_write(out / "matrix.md", text)
    with open_atomic(out / "matrix.csv") as file:
        writer = csv.writer(file, lineterminator="\n")
        keys = ("mean", "low", "high")
        writer.writerow((*Cell._fields, *keys, *(f"difference_{key}" for key in keys)))
        for cell in matrix["cells"].values():
            less = cell.get("difference", {})
            own = [cell[key] for key in Cell._fields] + [cell["em"][key] for key in keys]
            writer.writerow((*own, *(less.get(key) for key in keys)))
