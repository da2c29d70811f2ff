"""Sources of a report: any run or evaluation or folder of them, and a fair choice of trajectories."""

import json
from collections import Counter

import pytest

from agent.evaluation.measures import evaluation_record
from agent.evaluation.records import read_records
from agent.evaluation.report.choice import Choice, choose
from agent.evaluation.report.folders import read_folder
from agent.evaluation.report.page import render_report, write_report
from agent.evaluation.scores import score
from data.errors import ConfigError, DataError
from data.jsonl import write_json, write_jsonl
from data.run_dir import RunDir
from scripts import __main__ as sleuth
from scripts.train import train
from tests.scripts.test_report import Page, make_question, make_run, make_trajectory, write_evaluation
from tests.toy import toy_config


def payload(folder, **choice):
    return json.loads(Page(render_report(folder, Choice(**choice))).data)


def evaluation(folder, right, count=9):
    """An evaluation in which the questions whose number is in `right` are answered rightly."""
    write_evaluation(folder, [make_trajectory(make_question(i), i in right) for i in range(count)])
    write_json(folder / "evaluation.json", {"format_version": 1, "policy": f"[{folder.name}]"})


def test_the_folder_of_an_evaluation_has_a_page(tmp_path, capsys):
    evaluation(tmp_path / "alone", {1, 2})
    assert sleuth.main(["report", str(tmp_path / "alone")]) == 0
    html = (tmp_path / "alone" / "report.html").read_text()
    assert capsys.readouterr().out.strip() == str(tmp_path / "alone" / "report.html")
    assert "Sleuth evaluation" in html and "<b>0.222</b>" in html and "[alone]" in html
    found = json.loads(Page(html).data)
    assert found["evaluations"] == ["alone"] and len(found["questions"]) == 9
    assert found["left_out"] == 0 and found["chosen"] == ""


def test_an_evaluation_under_way_has_one_too(tmp_path):
    evaluation(tmp_path / "alone", {1})
    (tmp_path / "alone" / "scores.json").unlink()
    assert "unfinished" in render_report(tmp_path / "alone")


def test_several_evaluations_in_a_folder_stand_side_by_side(tmp_path):
    evaluation(tmp_path / "small", {1})
    evaluation(tmp_path / "deeper" / "large", {1, 2, 3})
    found = payload(tmp_path)
    assert found["evaluations"] == ["small", "deeper/large"]
    assert [len(question["runs"]) for question in found["questions"]] == [2] * 9
    assert "+0.222</b>" in render_report(tmp_path)  # of two, whatever their names, the difference is shown


def test_several_runs_in_a_folder_have_their_curves_and_evaluations_by_name(tmp_path):
    for name in ("one", "two"):
        make_run(tmp_path / name, count=6, steps=3)
    found = payload(tmp_path)
    assert found["evaluations"] == ["one/before", "one/after", "two/before", "two/after"]
    assert {"reward/mean (one)", "reward/mean (two)"} <= found["metrics"].keys()
    html = render_report(tmp_path)
    assert "2 runs, 4 evaluations" in html and "# one" in html


@pytest.mark.slow
def test_after_a_training_its_evaluations_on_dev_are_there(toy, tmp_path):
    train(toy_config(toy, tmp_path / "run", steps=5, eval_every=1))
    found = payload(tmp_path / "run")
    assert {"dev-000001", "dev-000005"} <= set(found["evaluations"])
    assert len(found["questions"]) == 12 and "dev/em" in found["metrics"]
    assert (write_report(tmp_path / "run")).exists()


def test_of_many_evaluations_on_dev_first_best_and_last_are_shown_and_the_others_named(tmp_path, caplog):
    for step, right in {10: {1}, 20: {1, 2, 3}, 30: {1, 2}, 40: {2}}.items():
        evaluation(tmp_path / "evaluations" / f"dev-{step:06d}", right)
    evaluation(tmp_path / "evaluations" / "before", {5})
    RunDir(tmp_path, {}, beside={"evaluations"}).close()
    caplog.set_level("INFO")
    found = payload(tmp_path)
    assert found["evaluations"] == ["before", "dev-000010", "dev-000020", "dev-000040"]
    assert "'*' adds 1 other (dev-000030)" in found["chosen"] and found["chosen"] in caplog.text
    assert payload(tmp_path, evaluations="dev-*")["evaluations"] == [f"dev-0000{i}0" for i in (1, 2, 3, 4)]
    assert payload(tmp_path, evaluations="dev-000030, before")["evaluations"] == ["before", "dev-000030"]
    with pytest.raises(ConfigError, match="none is called 'after'; there are before, dev-000010"):
        payload(tmp_path, evaluations="after")


def test_a_run_that_is_half_there_and_a_folder_of_nothing(tmp_path):
    RunDir(tmp_path / "run", {}).close()
    assert payload(tmp_path / "run")["questions"] == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty is no run folder and no evaluation, and holds none"):
        render_report(tmp_path / "empty")
    write_jsonl(tmp_path / "bad" / "trajectories.jsonl", [{"id": "x"}])
    with pytest.raises(DataError, match="trajectory 'x': missing or wrong: question, gold_"):
        render_report(tmp_path / "bad")
    whole = evaluation_record(make_trajectory(make_question(0), True))
    for key, odd in (("gold_answers", [3]), ("segments", [{"text": "no kind"}]), ("searches", ["q"])):
        write_jsonl(tmp_path / "bad" / "trajectories.jsonl", [{**whole, key: odd}])
        with pytest.raises(DataError, match=f"missing or wrong: {key}"):
            render_report(tmp_path / "bad")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """6,000 questions of two kinds; every hundredth is of kind rare, every tenth is right."""
    folder = tmp_path_factory.mktemp("large")
    record = evaluation_record(make_trajectory(make_question(0), True))
    prompt, *_, answer = record["segments"]
    rows = [
        {
            **record,
            "id": f"q{i}",
            "question": f"question {i}?",
            "segments": [prompt, answer],
            "searches": [],
            "answer": record["answer"] if i % 10 == 0 else "none of these",
            "metadata": {"kind": "rare" if i % 100 == 7 else "common"},
        }
        for i in range(6000)
    ]
    write_jsonl(folder / "trajectories.jsonl", rows)
    write_json(folder / "scores.json", score(rows[:9]))  # of all it takes seconds
    return folder


@pytest.mark.slow
def test_of_too_many_trajectories_a_fair_sample_is_embedded_that_says_so(large, tmp_path, caplog):
    caplog.set_level("INFO")
    found = payload(large, megabytes=0.4)
    shown = [int(question["id"][1:]) for question in found["questions"]]
    kept = len(shown)
    assert 500 < kept < 3000 and found["left_out"] == 6000 - kept and shown == sorted(shown)
    assert max(shown) > 5000 and min(shown) < 1000  # not the first
    assert abs(sum(i % 10 == 0 for i in shown) / kept - 0.1) < 0.01
    assert abs(sum(i % 100 == 7 for i in shown) / kept - 0.01) < 0.005
    assert f"{kept:,} of 6,000 questions are shown, a sample" in found["chosen"]
    assert found["chosen"] in caplog.text


@pytest.mark.slow
def test_every_trajectory_can_be_reached(large, tmp_path, capsys):
    wrong = payload(large, verdict="right", megabytes=0.4)
    assert {int(q["id"][1:]) % 10 for q in wrong["questions"]} == {0} and len(wrong["questions"]) == 600
    assert wrong["chosen"] == "600 of 6,000 questions are those asked for"
    assert len(payload(large, kind="rare", megabytes=0.4)["questions"]) == 60
    assert [q["id"] for q in payload(large, questions=("q5999", "q17"))["questions"]] == ["q17", "q5999"]
    assert len(payload(large, megabytes=50)["questions"]) == 6000
    (tmp_path / "ids.txt").write_text("q5999\nq4321\n\n")
    assert sleuth.main(["report", str(large), "--questions", str(tmp_path / "ids.txt")]) == 0
    data = json.loads(Page((large / "report.html").read_text()).data)
    assert [q["id"] for q in data["questions"]] == ["q4321", "q5999"]
    for options, said in (
        (["--questions", "q1,absent"], "questions: 'absent' is not among"),
        (["--megabytes", "0"], "megabytes = 0.0: must be > 0"),
        (["--kind", "odd"], "kind = 'odd': must be one of common, rare"),
    ):
        assert sleuth.main(["report", str(large), *options]) == 2
        assert said in capsys.readouterr().err


def test_fixed_and_broken_compare_with_the_first_evaluation(tmp_path):
    evaluation(tmp_path / "evaluations" / "before", {1, 2})
    evaluation(tmp_path / "evaluations" / "after", {2, 3})
    RunDir(tmp_path, {}, beside={"evaluations"}).close()
    for verdict, expected in {
        "fixed": ["test-3"],
        "broken": ["test-1"],
        "right": ["test-2", "test-3"],
    }.items():
        assert [q["id"] for q in payload(tmp_path, verdict=verdict)["questions"]] == expected
    with pytest.raises(
        ConfigError, match="fixed, kind = two_hop: no such question; there are 0 right, 3 wrong"
    ):
        payload(tmp_path, verdict="fixed", kind="two_hop")


def test_what_is_right_is_for_the_judge_to_say_where_there_is_one(tmp_path):
    evaluation(tmp_path, {1, 2}, 4)
    answers = {record["id"]: record["answer"] for record in read_records(tmp_path)}
    rulings = {"test-0": "correct", "test-1": "incorrect", "test-3": None}
    rows = [{"id": id_, "answer": answers[id_], "verdict": ruling} for id_, ruling in rulings.items()]
    write_jsonl(tmp_path / "judgements.jsonl", rows)
    shown = {q["id"]: q["runs"][0] for q in payload(tmp_path)["questions"]}
    assert [id_ for id_, run in shown.items() if run["right"]] == ["test-0", "test-2"]
    assert [run["judged"] for run in shown.values()] == ["correct", "incorrect", None, None]
    wrong = [q["id"] for q in payload(tmp_path, verdict="wrong")["questions"]]
    assert wrong == ["test-1", "test-3"]


def test_whatever_number_is_taken_kinds_and_verdicts_have_their_shares(large):
    order = choose(read_folder(large), Choice())
    assert order == choose(read_folder(large), Choice()) and len(set(order)) == 6000

    def group(id_):
        number = int(id_[1:])
        return number % 100 == 7, number % 10 == 0

    for count in (3, 100, 1000):
        shares = Counter(map(group, order[:count]))
        assert set(shares) == {(False, False), (False, True), (True, False)}
        assert abs(shares[False, True] - count * 0.1) <= 2 and abs(shares[True, False] - count * 0.01) <= 2
