"""The published recipes, on trajectories whose examples are worked out by hand; labels by scores."""

import json

import pytest

from data.errors import ConfigError, DataError
from data.jsonl import read_jsonl, write_jsonl
from rl.co_training.examples import RECIPES, LabelConfig, mine_trajectories, reasoning_weights
from rl.co_training.searches import read_scores
from scripts.bench import labellers
from tests.rl.co_training.test_labels import search, trajectory


def mined(records, tmp_path, config, scores=None):
    write_jsonl(tmp_path / "t.jsonl", records)
    if scores is not None:
        write_jsonl(tmp_path / "scores.jsonl", scores)
        scores = tmp_path / "scores.jsonl"
    tally = mine_trajectories(tmp_path / "t.jsonl", tmp_path / "out.jsonl", config, scores=scores)
    return tally, list(read_jsonl(tmp_path / "out.jsonl"))


def scored(call, query, scores, name="judge"):
    scores = {id_: score if isinstance(score, dict) else {name: score} for id_, score in scores.items()}
    return {"line": 1, "call": call, "id": "q1", "query": query, "scores": scores}


READING = trajectory(
    [
        search("tower", ["eiffel", "cow"], 0), search("1", ["eiffel"], 1, "open_page"),
        search("birth", ["cow", "mustard"], 2), search("cow", ["cow"], 3, "open_page"),
        search("birth of Eiffel", ["eiffel", "born", "mustard"], 4), search("2", ["born"], 5, "open_page"),
    ],
    ["a", "open the first of them", "one two three", "c", "d", "e", "one two three four five six"],
)  # fmt: skip


def test_iter_takes_tiers_of_the_whole_trajectory_and_the_query_with_its_history(tmp_path):
    useless = [scored(2, "birth", {"cow": 20}, "read")]
    _, rows = mined([READING], tmp_path, RECIPES["iter"], useless)
    assert [row["positives"] for row in rows] == [["eiffel"], ["born"]]
    assert "negatives" not in rows[0]  # cow is read later: neither unopened, nor known by then
    last = rows[1]
    assert last["query"].endswith("Query: birth of Eiffel\nEarlier queries:\n1. tower\n2. birth")
    assert last["provenance"]["negative_weights"] == {"eiffel": 3.0, "cow": 1.0, "mustard": 0.3}
    assert last["negatives"] == ["eiffel", "cow", "mustard"]


def test_iter_takes_at_most_three_of_the_upper_tiers_and_nine_in_all(tmp_path):
    from tests.rl.co_training import test_labels

    names = [f"p{n}" for n in range(14)]
    test_labels.CORPUS.update(dict.fromkeys(names, "text"))
    calls = []
    for turn, name in enumerate(names[:4]):
        calls += [search(name, [name], 2 * turn), search(name, [name], 2 * turn + 1, "open_page")]
    calls += [search("last", names[4:], 8), search("p4", ["p4"], 9, "open_page")]
    _, rows = mined([trajectory(calls, ["a"] * 11)], tmp_path, RECIPES["iter"])
    assert rows[-1]["negatives"] == ["p0", "p1", "p2", *names[5:11]]


def test_lrat_takes_what_was_opened_against_the_rest_and_weighs_by_the_reasoning_after_it(tmp_path):
    _, rows = mined([READING], tmp_path, RECIPES["lrat"])
    assert [(row["query"], row["positives"], row.get("negatives", [])) for row in rows] == [
        ("tower", ["eiffel"], []), ("birth", ["cow"], ["mustard"]),
        ("birth of Eiffel", ["born"], ["mustard"]),  # eiffel is useful to another query of the question
    ]  # fmt: skip
    assert all("negative_weights" not in row["provenance"] for row in rows)
    weights = [row["provenance"]["weight"] for row in rows]  # 3, 1 and 6 tokens after the page
    assert weights == pytest.approx(reasoning_weights([3, 1, 6]), abs=1e-6)
    with pytest.raises(DataError, match="searches of trajectories with a wrong answer: 6"):
        mined([READING | {"answer": "Paris"}], tmp_path, RECIPES["lrat"])


def candidates(best):
    rest = {f"n{n:02}": {"alone": float(n % 2), "judge": 10.0 + n} for n in range(18)}
    return rest | best


def test_agentic_r_keeps_the_best_with_its_ties_and_draws_fifteen_of_the_rest(tmp_path):
    record = trajectory([search("tower", ["eiffel"], 0)], ["a", "b"])
    best = {f"b{n}": {"alone": 1.0, "judge": 90.0} for n in range(4)}
    _, rows = mined([record], tmp_path, RECIPES["agentic_r"], [scored(0, "tower", candidates(best))])
    [row] = rows
    assert row["positives"] == ["b0", "b1", "b2"]  # the fourth tie is neither
    assert len(set(row["negatives"])) == 15 and all(id_[0] == "n" for id_ in row["negatives"])
    assert row["query"] == "Where was the builder of the tower of Paris born? [SEP] tower"
    assert row["provenance"]["style"] == "question" and "weight" not in row["provenance"]


@pytest.mark.parametrize(
    "best", [{"b": {"alone": 0.0, "judge": 99.0}}, {"b": {"alone": 1.0, "judge": 59.0}}]
)  # the best of the rest has a judge's score of 27
def test_agentic_r_leaves_out_queries_that_no_candidate_answers(best, tmp_path):
    record = trajectory([search("tower", ["eiffel"], 0)], ["a", "b"])
    with pytest.raises(DataError, match="queries without a positive: 1"):
        mined([record], tmp_path, RECIPES["agentic_r"], [scored(0, "tower", candidates(best))])


def test_agentic_r_leaves_out_queries_with_too_few_negatives(tmp_path):
    record = trajectory([search("tower", ["eiffel"], 0)], ["a", "b"])
    scores = {"b": {"alone": 1.0, "judge": 99.0}, "n": {"alone": 0.0, "judge": 0.0}}
    with pytest.raises(DataError, match="queries with fewer than 15 negatives: 1"):
        mined([record], tmp_path, RECIPES["agentic_r"], [scored(0, "tower", scores)])


@pytest.mark.parametrize(
    ("labels", "scores", "positives", "negatives"),
    [
        ("judge", {"eiffel": 60, "cow": 59}, ["eiffel"], ["cow"]),
        ("fork", {"eiffel": 0.25, "cow": 0.0, "mustard": -0.5}, ["eiffel"], ["cow", "mustard"]),
        ("likelihood", {"eiffel": 0.7, "cow": 0.69}, ["eiffel"], ["cow"]),
    ],
)
def test_scores_become_labels(labels, scores, positives, negatives, tmp_path):
    record = trajectory([search("tower", ["eiffel", "cow", "mustard"], 0)], ["a", "b"])
    given = [scored(0, "tower", scores, labels)]
    _, [row] = mined([record], tmp_path, LabelConfig(labels), given)
    assert (row["positives"], row["negatives"]) == (positives, negatives)


def test_what_was_a_candidate_but_not_shown_is_not_redundant_later(tmp_path):
    record = trajectory([search("tower", ["cow"], 0), search("birth", ["eiffel"], 1)], ["a", "b", "c"])
    given = [scored(0, "tower", {"cow": 10, "eiffel": 90}), scored(1, "birth", {"eiffel": 90})]
    _, rows = mined([record], tmp_path, LabelConfig("judge"), given)
    assert [row["positives"] for row in rows] == [["eiffel"], ["eiffel"]]


def test_agentic_r_takes_the_best_also_where_an_earlier_search_had_shown_it(tmp_path):
    record = trajectory([search("tower", ["born", "cow"], 0), search("birth", ["born"], 1)], ["a"] * 3)
    best = candidates({"born": {"alone": 1.0, "judge": 90.0}})
    given = [scored(0, "tower", best), scored(1, "birth", best)]
    _, rows = mined([record], tmp_path, RECIPES["agentic_r"], given)
    assert [row["positives"] for row in rows] == [["born"], ["born"]]


def test_scores_of_another_file_and_missing_ones_are_refused(tmp_path):
    record = trajectory([search("tower", ["eiffel"], 0)], ["a", "b"])
    with pytest.raises(ConfigError, match="labels = fork: needs scores"):
        mined([record], tmp_path, LabelConfig("fork"))
    with pytest.raises(DataError, match=r"t\.jsonl:1: .*the scores are of another file: 'cow', here 'tower'"):
        mined([record], tmp_path, LabelConfig("fork"), [scored(0, "cow", {"eiffel": 1.0}, "fork")])


def test_labellers_are_measured_against_gold(tmp_path, capsys):
    record = trajectory([search("tower", ["eiffel", "cow", "mustard"], 0)], ["a", "b"])
    write_jsonl(tmp_path / "t.jsonl", [record])
    scores = {"eiffel": 1.0, "cow": 1.0, "mustard": -1.0}
    write_jsonl(tmp_path / "s.jsonl", [scored(0, "tower", scores, "fork")])
    labellers.main(tmp_path / "t.jsonl", tmp_path / "s.jsonl")
    said = capsys.readouterr().out
    assert "| `fork` | 3 | 1 | 2 | 0.500 | 1.000 | 0.750 |" in said  # cow ties with the gold passage
    assert "| `answer` | 3 | 1 | 1 | 0.000 | 0.000 |  |" in said and "judge" not in said


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_files_give_the_same_bytes(name, tmp_path):
    best = {"b0": {"alone": 1.0, "judge": 90.0}}
    scores = [scored(0, "tower", candidates(best))]
    mined([READING], tmp_path, RECIPES[name], scores)
    first = (tmp_path / "out.jsonl").read_bytes()
    mined([READING], tmp_path, RECIPES[name], scores)
    assert (tmp_path / "out.jsonl").read_bytes() == first and json.loads(first.splitlines()[0])


@pytest.mark.parametrize("row", [{"line": 1, "call": 0}, {"scores": {"a": 3}}, {"id": "a question"}])
def test_a_file_that_holds_no_scores_is_named_with_its_line(row, tmp_path):
    write_jsonl(tmp_path / "scores.jsonl", [row])
    with pytest.raises(DataError, match=r"scores\.jsonl:1: no scores of `sleuth score-searches`"):
        read_scores(tmp_path / "scores.jsonl")
