"""Run files in the form that BrowseComp-Plus' script reads, its summary, and what ours says beside it."""

import json

import numpy as np
import pytest

from agent.evaluation.browsecomp import check_run_files, write_run_files
from agent.evaluation.measures import evaluation_record
from agent.trajectory import SearchRecord, Segment, SegmentKind, StopReason, Trajectory
from data.errors import ConfigError
from data.formats.answer_sets import common_row, official_metric, slice_of_each
from data.jsonl import write_json, write_jsonl
from data.metrics.calibration import expected_calibration_error
from data.questions import load_questions
from data.records import Hit, Passage, Question
from scripts.__main__ import main as sleuth


def evaluation(folder, count=120, right=lambda i: i % 3 == 1):
    """Answers of confidence 90 %, a third right; each search finds one of two evidence documents."""
    records, verdicts = [], []
    for i in range(count):
        question = Question(f"{i}", f"Q{i}", ("gold",), {"supporting_ids": ["7", "9"]})
        said = f"Explanation: see [7] and [8, {i}].\nExact Answer: gold\nConfidence: 90%"
        found = [Hit(Passage("7#2", "t", "", {"document": "7"}), 1.0, "g"), Hit(Passage("5", "t"), 1.0, "g")]
        segments = [Segment(SegmentKind.POLICY, [1], f"<think>a</think><answer>{said}</answer>", None)]
        searches = [SearchRecord("q", found, 0.1), SearchRecord("1", found[:1], 0.1, None, 1, "open_page")]
        stop, answer = (StopReason.ANSWERED, "gold") if i else (StopReason.TURN_LIMIT, None)
        trajectory = Trajectory(question, segments, stop, answer, searches, confidence=0.9)
        records.append(evaluation_record(trajectory))
        reply = f"correct: {'yes' if right(i) else 'no'}\nconfidence: 90"
        verdict = "correct" if right(i) else "incorrect"
        told = {"verdict": verdict, "reply": reply if answer else "", "error": None}
        verdicts.append({"id": f"{i}", "answer": answer, **told})
    write_jsonl(folder / "trajectories.jsonl", records)
    write_jsonl(folder / "judgements.jsonl", verdicts)
    write_json(folder / "evaluation.json", {"policy": "p", "retriever": "bm25-1"})
    return folder


def test_run_files_hold_what_the_script_reads(tmp_path):
    write_run_files(evaluation(tmp_path / "e"), tmp_path / "runs")
    files = sorted((tmp_path / "runs").glob("run_*.json"))
    assert len(files) == 120
    run = json.loads((tmp_path / "runs" / "run_7.json").read_text())
    assert (run["query_id"], run["status"]) == ("7", "completed")
    assert run["tool_call_counts"] == {"search": 1, "open_page": 1} and run["retrieved_docids"] == ["5", "7"]
    assert run["result"][-1]["type"] == "output_text" and "Exact Answer: gold" in run["result"][-1]["output"]
    assert json.loads((tmp_path / "runs" / "run_0.json").read_text())["status"] == "turn_limit"


def test_ids_that_are_no_file_names_share_no_run_file(tmp_path):
    ids = ["q/2", "q 2", "q_2", "x" * 300, "../up", "ü"]
    trajectories = [
        Trajectory(Question(id_, "Q", ("a",), {"supporting_ids": odd}), [], StopReason.TURN_LIMIT, None, [])
        for id_, odd in zip(ids, [None, "7", ["7"], [], [7], "[7, 8]"], strict=True)
    ]
    write_jsonl(tmp_path / "trajectories.jsonl", map(evaluation_record, trajectories))
    write_json(tmp_path / "evaluation.json", {})
    found = write_run_files(tmp_path, tmp_path / "runs")
    runs = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("run_*.json")]
    assert {run["query_id"] for run in runs} == {*ids} and (tmp_path / "runs" / "run_q_2.json").exists()
    assert [row["recall"] for row in found["per_query_metrics"]] == [None, 0, 0, None, 0, 0]
    check_run_files(tmp_path / "runs", [trajectory.question for trajectory in trajectories])
    with pytest.raises(ConfigError, match="holds other files"):
        check_run_files(tmp_path / "runs", [trajectory.question for trajectory in trajectories[1:]])


def test_the_summary_has_its_keys_and_ours_beside_them(tmp_path):
    found = write_run_files(evaluation(tmp_path / "e"), tmp_path / "runs")
    assert json.loads((tmp_path / "runs" / "evaluation_summary.json").read_text()) == found
    assert (found["Accuracy (%)"], found["Recall (%)"]) == (33.33, 50.0)
    assert found["avg_tool_stats"] == {"search": 1.0, "open_page": 1.0}
    assert found["per_query_metrics"][4] == {"query_id": "4", "correct": True, "recall": 50.0}
    # 120 answers of 90 %, a third right: theirs is 0, for it leaves out the only bin.
    assert found["Calibration Error (%)"] == 0
    assert found["sleuth"]["calibration_error_percent"] == pytest.approx(100 * (0.9 - 1 / 3), abs=0.01)
    cited = found["sleuth"]["citations"]
    assert cited["coverage"] == 1.0 and 0.3 < cited["precision"] < 0.5
    confidence, right = np.full(120, 0.9), np.array([i % 3 == 1 for i in range(120)], dtype=float)
    assert expected_calibration_error(confidence, right, norm=2) == pytest.approx(0.9 - 1 / 3)


def test_rows_of_frames_simpleqa_and_browsecomp_plus_are_questions(tmp_path):
    write_jsonl(
        tmp_path / "q.jsonl",
        [
            {"query_id": 7, "query": "Who?", "answer": "me", "evidence_docs": [{"docid": "12", "text": "t"}]},
            {"Prompt": "Where?", "Answer": "here", "reasoning_types": "Tabular reasoning | Other"},
            {"problem": "When?", "answer": "now", "metadata": "{'topic': 'x'}"},
            {"question": "Why?", "query": "other", "answer": "so"},
        ],
    )
    questions = load_questions(str(tmp_path / "q.jsonl"))
    assert [(q.text, q.gold_answers) for q in questions] == [
        ("Who?", ("me",)), ("Where?", ("here",)), ("When?", ("now",)), ("Why?", ("so",)),
    ]  # fmt: skip
    assert questions[0].id == "7" and questions[0].metadata["supporting_ids"] == ["12"]
    assert questions[1].metadata["kind"] == "Tabular reasoning"
    assert common_row({"query": "no answer"}) == {"query": "no answer"}
    assert (official_metric("2WikiMultihopQA"), official_metric("mine")) == ("hotpot_f1", None)


def test_a_slice_has_so_many_of_each_set_and_does_not_depend_on_the_others():
    def of(name, count):
        return [Question(f"{name}{i}", "?", ("a",), {"data_source": name}) for i in range(count)]

    both = slice_of_each([*of("nq", 50), *of("bamboogle", 3)], 5)
    assert [q.metadata["data_source"] for q in both].count("nq") == 5 and len(both) == 8
    assert [q for q in slice_of_each(of("nq", 50), 5)] == both[:5]
    assert len({q.id for q in slice_of_each(of("nq", 50), 20)} & {q.id for q in both[:5]}) == 5


def test_the_seven_sets_go_by_name(monkeypatch):
    from data import questions as module

    asked = []

    def read(name, split, known_as):
        asked.append((name, split, known_as))
        yield module._Row({"question": "q", "golden_answers": ["a"]}, "x", 0, "FlashRAG", "test")

    monkeypatch.setattr(module, "_read_hub", read)
    loaded = load_questions("search_r1,simpleqa")
    assert [q.metadata["data_source"] for q in loaded] == [
        "nq", "triviaqa", "popqa", "hotpotqa", "2wiki", "musique", "bamboogle", "simpleqa",
    ]  # fmt: skip
    assert asked[3] == ("RUC-NLPIR/FlashRAG_datasets:hotpotqa", "dev", "hotpotqa")


def test_without_a_hub_a_set_by_name_is_one_line_that_says_what_to_do(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("data.models.hub._why_not_on_hub", lambda name, kind: "the hub cannot be reached (x)")
    for command in ("evaluate --policy atlas --retriever none --out", "audit --corpus"):
        given = [*command.split(), str(tmp_path / "x"), "--questions", "popqa,nq"]
        assert sleuth(given) == 2
        error = capsys.readouterr().err
        assert "sleuth: questions: popqa = 'RUC-NLPIR/FlashRAG_datasets': no file or folder" in error
        assert "a local .jsonl, .json or .parquet file needs no hub" in error and error.count("\n") == 1
