"""The gate: passes a retriever that finds more, refuses one that does not or that forgets plain questions."""

import json

import pytest

from data.errors import DataError
from data.jsonl import write_jsonl
from data.records import Hit, Passage, Question
from retriever_server.retriever import Retriever
from rl.co_training.gate import Asked, judge_retrievers, read_asked
from tests.rl.co_training.test_labels import search, trajectory


class Ranks(Retriever):
    """Finds the passages that a table names for each query."""

    generation = "g"

    def __init__(self, table, style=None):
        self.table, self.style = table, style

    def query_style(self):
        return self.style

    def search(self, queries, k, where=None):
        return [[Hit(Passage(id_, ""), 1.0, "g") for id_ in self.table.get(q, ())[:k]] for q in queries]


QUESTIONS = [Question(str(n), f"Q{n}", ("a",), {"supporting_ids": [f"p{n}"]}) for n in range(40)]
SEARCHES = [Asked(f"q{n}", question) for n, question in enumerate(QUESTIONS)]
RIGHT = {f"q{n}": [f"p{n}"] for n in range(40)}
HALF = {query: ids for query, ids in RIGHT.items() if int(query[1:]) % 2}
PLAIN = {f"Q{n}": [f"p{n}"] for n in range(40)}


def plain_of(decision):
    return (decision.plain or {})["mean"]


def test_a_retriever_that_finds_more_passes():
    decision = judge_retrievers(SEARCHES, QUESTIONS, Ranks(HALF | PLAIN), Ranks(RIGHT | PLAIN))
    assert decision.passed and (decision.old_found, decision.new_found) == (0.5, 1.0)
    assert decision.gain["mean"] == 0.5 and decision.gain["low"] > 0 and plain_of(decision) == 0
    json.dumps(decision.as_record())


def test_the_same_retriever_is_refused():
    decision = judge_retrievers(SEARCHES, [], Ranks(HALF), Ranks(HALF))
    assert not decision.passed and "not above 0" in decision.reason


def test_one_that_forgets_plain_questions_is_refused():
    forgets = RIGHT | {question: ids for question, ids in PLAIN.items() if question != "Q3"}
    decision = judge_retrievers(SEARCHES, QUESTIONS, Ranks(HALF | PLAIN), Ranks(forgets))
    assert not decision.passed and decision.reason == "plain questions lose 0.025, allowed is 0.01"


def test_a_gold_passage_that_was_shown_before_is_not_found_again():
    question = Question("1", "Q", ("a",), {"supporting_ids": ["a", "b"]})
    asked = Asked("q", question, (Passage("a", ""),))
    assert asked.finds(Passage("b", "")) and not asked.finds(Passage("a", ""))
    assert not Asked("q", question, (Passage("a", ""), Passage("b", ""))).is_open


def test_without_gold_passages_the_answer_in_the_text_counts():
    asked = Asked("q", Question("1", "Q", ("Paris",)))
    assert asked.finds(Passage("x", "It is Paris.")) and not asked.finds(Passage("x", "It is Lyon."))


def test_what_the_old_retriever_never_showed_counts_for_the_new_one(tmp_path):
    write_jsonl(
        tmp_path / "t.jsonl", [trajectory([search("tower", ["cow"], 0), search("x", ["eiffel"], 1)], "abc")]
    )
    asked = list(read_asked(tmp_path / "t.jsonl"))
    assert [a.text("history").split("\n", 1)[1] for a in asked] == [
        "Query: tower", "Query: x\nEarlier queries:\n1. tower",
    ]  # fmt: skip
    decision = judge_retrievers(asked, [], Ranks({}), Ranks({a.query: ["eiffel"] for a in asked}))
    assert (decision.old_found, decision.new_found) == (0.0, 1.0)


def test_each_retriever_is_asked_in_its_own_style_and_plain_questions_as_they_stand():
    searches = [Asked(f"q{n}", question, (), ()) for n, question in enumerate(QUESTIONS)]
    styled = {f"Q{n} [SEP] q{n}": [f"p{n}"] for n in range(40)}
    decision = judge_retrievers(searches, QUESTIONS, Ranks(RIGHT | PLAIN), Ranks(styled | PLAIN, "question"))
    assert (decision.old_found, decision.new_found, plain_of(decision)) == (1.0, 1.0, 0.0)


def test_no_searches_are_no_judgement():
    with pytest.raises(DataError, match="no held-out search"):
        judge_retrievers([], QUESTIONS, Ranks({}), Ranks({}))
