"""The gate: passes a retriever that finds more, refuses one that does not or that forgets plain questions."""

import json

import pytest

from data.errors import DataError
from data.records import Example, Hit, Passage, Question
from retriever_server.retriever import Retriever
from rl.co_training.gate import judge_retrievers


class Ranks(Retriever):
    """Finds the passages that a table names for each query."""

    generation = "g"

    def __init__(self, table):
        self.table = table

    def search(self, queries, k, where=None):
        return [[Hit(Passage(id_, ""), 1.0, "g") for id_ in self.table.get(q, ())[:k]] for q in queries]


EXAMPLES = [Example(f"q{n}", (f"p{n}",), provenance={"question_id": str(n)}) for n in range(40)]
QUESTIONS = [Question(str(n), f"Q{n}", ("a",), {"supporting_ids": [f"p{n}"]}) for n in range(40)]
RIGHT = {f"q{n}": [f"p{n}"] for n in range(40)}
HALF = {query: ids for query, ids in RIGHT.items() if int(query[1:]) % 2}
PLAIN = {f"Q{n}": [f"p{n}"] for n in range(40)}


def test_a_retriever_that_finds_more_passes():
    decision = judge_retrievers(EXAMPLES, QUESTIONS, Ranks(HALF | PLAIN), Ranks(RIGHT | PLAIN))
    assert decision.passed and (decision.old_recall, decision.new_recall) == (0.5, 1.0)
    assert decision.gain["mean"] == 0.5 and decision.gain["low"] > 0 and decision.plain["mean"] == 0
    json.dumps(decision.as_record())


def test_the_same_retriever_is_refused():
    decision = judge_retrievers(EXAMPLES, [], Ranks(HALF), Ranks(HALF))
    assert not decision.passed and "not above 0" in decision.reason


def test_one_that_forgets_plain_questions_is_refused():
    forgets = RIGHT | {question: ids for question, ids in PLAIN.items() if question != "Q3"}
    decision = judge_retrievers(EXAMPLES, QUESTIONS, Ranks(HALF | PLAIN), Ranks(forgets))
    assert not decision.passed and decision.reason == "plain questions lose 0.025, allowed is 0.01"


def test_recall_counts_the_share_of_the_positives_among_the_first_k():
    example = [Example("q", ("a", "b"), provenance={"question_id": str(n)}) for n in range(2)]
    decision = judge_retrievers(example, [], Ranks({}), Ranks({"q": ["x", "a", "b"]}), k=2)
    assert decision.new_recall == 0.5


def test_no_searches_are_no_judgement():
    with pytest.raises(DataError, match="no held-out search"):
        judge_retrievers([], QUESTIONS, Ranks({}), Ranks({}))
