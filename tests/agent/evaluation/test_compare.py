"""Runs side by side: differences against a plain loop, what flipped, several seeds as one run, exports."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from agent.evaluation.compare import compare, read_runs, short_names, write_csv
from agent.evaluation.measures import evaluation_record
from agent.evaluation.report.choice import Choice
from agent.evaluation.report.folders import read_folders
from agent.evaluation.report.page import render_report
from agent.evaluation.scores import score
from agent.evaluation.summary import describe
from agent.trajectory import Segment, SegmentKind, StopReason, Trajectory
from data.errors import ConfigError, DataError
from data.jsonl import write_jsonl
from data.metrics.answers import METRICS
from data.metrics.significance import bootstrap
from data.records import Question
from scripts.__main__ import main as sleuth


def run(folder, right, count=20, text="Who is"):
    """An evaluation of questions q0, q1, ...; those in `right` are answered rightly."""
    records = []
    for i in range(count):
        question = Question(
            f"q{i}", f"{text} {i}?", ("gold",), {"cluster": f"c{i // 2}", "kind": f"k{i % 2}"}
        )
        answer = "gold" if i in right else "=lead|x"
        segments = [Segment(SegmentKind.POLICY, [1] * (i + 1), f"<answer>{answer}</answer>", None)]
        records.append(evaluation_record(Trajectory(question, segments, StopReason.ANSWERED, answer)))
    write_jsonl(folder / "trajectories.jsonl", records)
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    return [
        run(tmp_path / "x" / "a", set(range(8))),
        run(tmp_path / "x" / "b", set(range(4, 18))),
        run(tmp_path / "x" / "c", {0}),
    ]


def test_differences_are_those_of_the_same_questions_and_flips_are_named(runs):
    compared = compare(read_runs(runs))
    assert compared["runs"] == ["a", "b", "c"] and (compared["n"], compared["clusters"]) == (20, 10)
    first, second, third = compared["measures"]["EM"]
    assert (first["mean"], second["mean"], third["mean"]) == (0.4, 0.7, 0.05) and first["difference"] is None
    each = np.array([(4 <= i < 18) - (i < 8) for i in range(20)], dtype=float)
    low, high = bootstrap(each[:, None], [f"c{i // 2}" for i in range(20)])[:, 0]
    found = second["difference"]
    assert (found["mean"], found["low"], found["high"]) == (pytest.approx(0.3), low, high)
    assert compared["flipped"]["b"] == {
        "fixed": [f"q{i}" for i in range(8, 18)],
        "broken": ["q0", "q1", "q2", "q3"],
    }
    assert "judge" not in compared["measures"]  # nobody was asked


def test_a_judge_of_one_run_alone_flips_nothing(tmp_path, runs):
    judged = [{"id": f"q{i}", "answer": "gold", "verdict": "incorrect"} for i in range(8)]
    alone = run(tmp_path / "judged", set(range(8)))
    write_jsonl(Path(alone) / "judgements.jsonl", judged)
    compared = compare(read_runs([runs[0], alone]))
    assert compared["flipped"]["judged"] == {"fixed": [], "broken": []}


def test_verdicts_of_different_judges_are_not_compared(tmp_path, caplog):
    judged = [{"id": f"q{i}", "answer": "gold", "verdict": "correct", "rubric": "simpleqa"} for i in range(8)]
    folders = [run(tmp_path / name, set(range(8)), count=8) for name in ("a", "b")]
    for folder, model in zip(folders, ("large", "small"), strict=True):
        write_jsonl(Path(folder) / "judgements.jsonl", [{**each, "model": model} for each in judged])
    assert "judge" not in compare(read_runs(folders))["measures"]
    assert "large simpleqa None; small simpleqa None" in caplog.text


def test_three_seeds_are_one_run_whose_questions_are_means(tmp_path, runs):
    compared = compare(read_runs([runs[0], f"{runs[1]},{runs[2]}"]))
    assert compared["n"] == 20
    assert compared["measures"]["EM"][1]["mean"] == pytest.approx((0.7 + 0.05) / 2)


def test_runs_of_other_questions_are_refused_or_cut_to_the_common_ones(tmp_path, runs):
    more = run(tmp_path / "more", {1}, count=22)
    with pytest.raises(DataError, match="missing 2 questions: q20, q21"):
        compare(read_runs([runs[0], more]))
    assert compare(read_runs([runs[0], more]), common=True)["n"] == 20


def test_wrong_runs_are_one_line(tmp_path, runs, capsys):
    for given, said in (
        ([runs[0]], "at least two runs"),
        ([runs[0], runs[0]], "is given twice"),
        ([runs[0], str(tmp_path / "x")], "is no evaluation (no trajectories.jsonl); it holds"),
        ([runs[0], str(tmp_path / "none")], "is no evaluation"),
        ([*runs, "--csv", str(tmp_path)], f"csv = '{tmp_path}': must be a file, not a folder"),
    ):
        assert sleuth(["compare", *given]) == 2
        assert said in capsys.readouterr().err
    assert sleuth(["compare"]) == 2
    with pytest.raises(ConfigError):
        read_runs([])


@pytest.mark.parametrize("command", ["compare", "report"])
@pytest.mark.parametrize(
    ("changed", "says"),
    [({}, "is there twice"), ({"id": "z", "metadata": 3, "searches": None}, "wrong: metadata, searches")],
)
def test_what_is_no_record_or_one_too_many_is_one_line(tmp_path, runs, capsys, command, changed, says):
    path = tmp_path / "x" / "b" / "trajectories.jsonl"
    last = json.loads(path.read_text().splitlines()[-1])
    path.write_text(path.read_text() + json.dumps(last | changed) + "\n")
    assert sleuth([command, *runs]) == 2
    assert f"{path}: trajectory '{changed.get('id', 'q19')}': " in (error := capsys.readouterr().err)
    assert says in error and error.count("\n") == 1


def test_the_command_prints_a_table_and_writes_csv_markdown_and_json(tmp_path, runs, capsys):
    files = [str(tmp_path / name) for name in ("t.csv", "t.md", "t.json")]
    options = ["--csv", files[0], "--markdown", files[1], "--json", files[2], "--flipped", "1"]
    assert sleuth(["compare", runs[0], *options, runs[1]]) == 0
    out = capsys.readouterr().out
    assert (
        "+0.300 [" in out
        and "20 questions, 10 clusters" in out
        and "Who is 8?" in out
        and "Who is 9?" not in out
    )
    with open(files[0], newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40 and {row["run"] for row in rows} == {"a", "b"}
    assert rows[-1]["answer"] == "'=lead|x"  # no formula
    lines = Path(files[1]).read_text().splitlines()
    assert lines[0] == "| measure | a | b | difference [95 %] |" and lines[2].startswith(
        "| EM | 0.400 | 0.700 | +0.300"
    )
    assert len({line.count("|") for line in lines}) == 1
    assert json.loads(Path(files[2]).read_text())["flipped"]["b"]["broken"] == ["q0", "q1", "q2", "q3"]


def test_a_metric_that_is_added_is_told_of_evaluations_that_were_there_before(runs, monkeypatch, tmp_path):
    monkeypatch.setitem(METRICS, "one_word", lambda answer, golds, normalizer: float(answer == "gold"))
    records = read_runs(runs)["a"]
    assert [record["one_word"] for record in records] == [float(i < 8) for i in range(20)]
    assert ("one_word", "0.400 [0.100, 0.800] (10 clusters)") in describe(score(records))
    write_csv(tmp_path / "all.csv", read_runs(runs))
    rows = list(csv.DictReader((tmp_path / "all.csv").read_text().splitlines()))
    assert rows[0]["one_word"] == "1.0" and rows[0]["searches"] == "0"


def test_names_are_as_short_as_they_may_be():
    assert short_names(["r/a/after", "r/b/after"]) == ["a/after", "b/after"]
    assert short_names(["/x/a", "/y/b/"]) == ["a", "b"]


# ---- the report of several ---------------------------------------------------------------------


def test_the_report_of_several_runs_shows_each_difference_to_the_first(tmp_path, runs, capsys):
    assert sleuth(["report", *runs, "--out", str(tmp_path / "all.html")]) == 0
    page = (tmp_path / "all.html").read_text()
    assert capsys.readouterr().out.strip() == str(tmp_path / "all.html")
    assert "Exact match less that of a, paired" in page and "+0.300" in page and "-0.350" in page
    assert [e.name for e in read_folders(runs).evaluations] == ["a", "b", "c"]
    assert page.count("fixed (wrong there, right here)") == 1


def test_a_page_reads_no_more_trajectories_than_fit(tmp_path, monkeypatch):
    from agent.evaluation.report import collect

    folder, seen = run(tmp_path / "many", set(range(200)), count=600, text="Who " * 50), []
    real = collect.read_full
    monkeypatch.setattr(collect, "read_full", lambda e, ids: seen.append(len(ids)) or real(e, ids))
    page = render_report(folder, Choice(megabytes=0.08))
    assert len(page) < 180_000 and max(seen) < 480


@pytest.mark.slow
def test_in_a_browser_the_page_fits_a_phone_is_dark_when_asked_and_goes_by_keyboard(tmp_path, runs):
    from tests.retriever_server.server.test_search_page import CHROMIUM, Browser

    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    assert sleuth(["report", *runs, "--out", str(tmp_path / "all.html")]) == 0
    browser = Browser(tmp_path / "profile")
    try:
        phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        browser.call("Emulation.setDeviceMetricsOverride", **phone)
        dark = [{"name": "prefers-color-scheme", "value": "dark"}]
        browser.call("Page.navigate", url=f"file://{tmp_path / 'all.html'}")
        browser.wait_for("document.querySelectorAll('#list .row').length == 20")
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390
        light = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        browser.call("Emulation.setEmulatedMedia", features=dark)
        assert browser.evaluate("getComputedStyle(document.body).backgroundColor") != light
        reached = set()
        for _ in range(12):
            browser.call("Input.dispatchKeyEvent", type="keyDown", key="Tab", windowsVirtualKeyCode=9)
            reached.add(browser.evaluate("document.activeElement.id || document.activeElement.name"))
        assert {"eval", "verdict", "kind", "text", "list"} <= reached
        browser.evaluate("document.getElementById('list').focus()")
        browser.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowDown", windowsVirtualKeyCode=40)
        assert browser.evaluate("document.querySelector('[aria-selected=true]').dataset.id") == "q1"
    finally:
        browser.process.kill()
        browser.process.wait(timeout=20)
