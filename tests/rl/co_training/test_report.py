"""The page of a loop: searches that lost what they found are shown beside those that gained."""

from agent.evaluation.measures import evaluation_record
from agent.evaluation.records import read_records
from agent.evaluation.scores import score
from agent.trajectory import SearchRecord, Segment, SegmentKind, StopReason, Trajectory
from data.jsonl import write_json, write_jsonl
from data.records import Hit, Passage, Question
from rl.co_training.report import write_report


def searched(name, finds):
    question = Question(f"q{name}", "Where was Eiffel born?", ("Dijon",), {"supporting_ids": ["born"]})
    turn = Segment(SegmentKind.POLICY, [1], "<answer>Dijon</answer>", [0.0])
    hits = [Hit(Passage("born" if finds else "cow", "text of it"), 1.0, "g")]
    search = SearchRecord(f"q<{name}>", hits, 0.1)
    return evaluation_record(Trajectory(question, [turn], StopReason.ANSWERED, "Dijon", [search]))


def test_searches_that_lost_are_counted_and_shown_beside_those_that_gained(tmp_path):
    for number in (0, 1):
        dev = tmp_path / f"round-{number}" / "dev"
        rows = [searched(name, bool(number) == (name < 11)) for name in range(12)]  # eleven gain, one loses
        write_jsonl(dev / "trajectories.jsonl", rows)
        write_json(dev / "scores.json", score(read_records(dev)))
    state = {"history": [{"round": 0, "em": {"mean": 0.5, "low": 0.4, "high": 0.6}}]}
    write_json(tmp_path / "state.json", {"state": state})
    page = write_report(tmp_path).read_text()
    assert "First searches that changed: 11 gained, 1 lost" in page
    assert page.count("<td>gained</td>") == 5 and page.count("<td>lost</td>") == 1
    assert "q&lt;0&gt;" in page and "q<0>" not in page
