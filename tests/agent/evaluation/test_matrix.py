"""Cells, differences, effects, interaction and diagonal against plain loops; the files and the heat map."""

import csv
import re
from itertools import product

import numpy as np
import pytest

from agent.evaluation.matrix import Cell, read_matrix, write_matrix
from agent.evaluation.report.page import render_report
from data.errors import DataError
from data.metrics.significance import bootstrap
from tests.agent.evaluation.test_compare import run

COUNT = 20
CLUSTERS = [f"c{i // 2}" for i in range(COUNT)]


def make(tmp_path, policies, retrievers, limits=((None, None),)):
    """Cells of questions that are right by a rule of their own, and the scores."""
    draw, folders, scores = np.random.default_rng(0), {}, {}
    for policy, retriever, limit in product(policies, retrievers, limits):
        cell = Cell(policy, retriever, *limit)
        right = set(np.flatnonzero(draw.random(COUNT) < draw.random()))
        run(folders.setdefault(cell, tmp_path / "cells" / cell.name), right)
        scores[cell] = np.array([float(i in right) for i in range(COUNT)])
    return folders, scores


def check(found, each):
    """An estimate is the mean of these numbers, one a question, with the interval of their clusters."""
    low, high = bootstrap(np.array(each)[:, None], CLUSTERS)[:, 0]
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((np.mean(each), low, high))


def test_cells_and_differences_to_the_baseline_are_paired(tmp_path):
    folders, scores = make(tmp_path, ["a", "b"], ["x", "y", "z"], [(1, 2), (3, 2)])
    baseline = Cell("b", "y", 3, 2)
    matrix = read_matrix(folders, baseline)
    assert (matrix["n"], matrix["clusters"], matrix["baseline"]) == (20, 10, "b.y.k3.s2")
    assert matrix["cells"].keys() == {cell.name for cell in folders} and len(folders) == 12
    for cell, own in scores.items():
        row = matrix["cells"][cell.name]
        assert tuple(row[key] for key in Cell._fields) == cell
        check(row["em"], own)
        assert ("difference" in row) == (cell != baseline)
        if cell != baseline:
            check(row["difference"], own - scores[baseline])
    assert matrix["contrasts"] == {}


def test_two_by_two_has_its_effects_and_the_interaction_at_each_limit(tmp_path):
    folders, scores = make(tmp_path, ["before", "after"], ["old", "new"], [(None, 0), (None, 2)])
    contrasts = read_matrix(folders)["contrasts"]
    assert len(contrasts) == 6
    for s in (0, 2):
        bo, bn, ao, an = (
            scores[Cell(p, r, None, s)] for p, r in product(["before", "after"], ["old", "new"])
        )
        check(contrasts[f"policy at s{s}: after less before"], ((ao - bo) + (an - bn)) / 2)
        check(contrasts[f"retriever at s{s}: new less old"], ((bn - bo) + (an - ao)) / 2)
        check(contrasts[f"interaction at s{s}"], (an - ao) - (bn - bo))


def test_the_diagonal_is_compared_with_all_other_pairs(tmp_path):
    names = ["bm25", "dense", "sparse"]
    folders, scores = make(tmp_path, names, names)
    (found,) = read_matrix(folders, diagonal=True)["contrasts"].values()
    on = [scores[cell] for cell in folders if cell.policy == cell.retriever]
    off = [scores[cell] for cell in folders if cell.policy != cell.retriever]
    assert (len(on), len(off)) == (3, 6)
    check(found, np.mean(on, 0) - np.mean(off, 0))


def test_cells_of_other_questions_are_refused_by_name(tmp_path):
    folders, _ = make(tmp_path, ["a"], ["x", "y"])
    run(folders[Cell("a", "y")], {1}, count=19)
    with pytest.raises(DataError, match=r"a\.y: missing 1 question: q19"):
        read_matrix(folders)


def test_markdown_csv_and_the_reports_heat_map_say_the_same(tmp_path):
    folders, scores = make(tmp_path, ["before", "after"], ["old", "new"])
    write_matrix(tmp_path, read_matrix(folders, Cell("before", "old")))
    rows = list(csv.DictReader((tmp_path / "matrix.csv").open()))
    assert [Cell(r["policy"], r["retriever"]) for r in rows] == list(folders)
    markdown, page = (tmp_path / "matrix.md").read_text(), render_report(tmp_path)
    assert "| before | old |  |  |" in markdown and "| baseline |" in markdown
    assert page.count("--heat: ") == 4 and "interaction" in page and "interaction" in markdown
    assert "1 passages" not in page and '<section id="curves" hidden>' in page
    names = re.findall(r"(before|after)[.](old|new)", page.split("<thead>")[1].split("</thead>")[0])
    assert names[0] == ("before", "old") and len(names) == 4 and "cells/" not in page
    for row, (cell, own) in zip(rows, scores.items(), strict=True):
        assert float(row["mean"]) == pytest.approx(own.mean())
        assert (row["difference_mean"] == "") == (cell == Cell("before", "old"))
        assert f"{own.mean():.3f} [" in markdown
        assert f'<td style="--heat: {100 * own.mean():.0f}%"><b>{own.mean():.3f}</b>' in page
