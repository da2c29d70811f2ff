"""Filters: what each keeps and rejects, by examples and against a double loop."""

import random

import pytest

from data.errors import ConfigError, DataError
from data.jsonl import write_jsonl
from retriever_server.training.synthesis.config import EvaluationSet
from retriever_server.training.synthesis.drafts import Draft
from retriever_server.training.synthesis.filters import HeldOut, Seen, content_words, make_filters
from tests.retriever_server.training.synthesis.rivers import rivers


def draft(query, **changes):
    fields = {"query": query, **changes.pop("fields", {})}
    return Draft(**{"id": "d", "seed": "amadro", "positive": "amadro", "fields": fields, **changes})


def reason(corpus, name, given, **options):
    verdict = make_filters({name: options}, corpus)[name](given)
    return verdict if isinstance(verdict, str) else ""


@pytest.fixture
def corpus(tmp_path):
    return rivers(tmp_path)


CASES = [
    ("length", "amadro length", {}, "too short"),
    ("length", "how long is the amadro", {}, ""),
    ("length", "why " * 65, {}, "too long"),
    ("language", "how long is the amadro", {"draws": {"language": "English"}}, ""),
    ("language", "wie lang ist der fluss", {"draws": {"language": "English"}}, "another language"),
    ("language", "wie lang ist der amadro", {"draws": {"language": "German"}}, ""),
    ("language", "какая длина реки", {"draws": {"language": "English"}}, "another language"),
    ("language", "какая длина реки", {"draws": {"language": "Russian"}}, ""),
    ("language", "how long is the amadro", {"draws": {"language": "Japanese"}}, "another language"),
    ("language", "川の長さは何ですか", {"draws": {"language": "Japanese"}}, ""),
    ("language", "anything", {"draws": {"language": "Klingon"}}, ""),
    ("vague", "what is it about", {}, "vague"),
    ("vague", "what is the main idea", {}, "vague"),
    ("vague", "length of the amadro", {}, ""),
    ("vague", "what does the passage say of the amadro river", {}, "points at the passage"),
    ("vague", "authors who measured rivers in miles", {}, ""),
    ("quotes", "river amadro rises near mount", {}, "quotes the passage"),
    ("quotes", "amadro rises", {}, ""),
    ("quotes", "what river amadro rises near mount", {}, ""),  # a question in the passage's words
    ("quotes", "where the river amadro rises near mount amadrous and is 90 miles", {}, "quotes the passage"),
    ("quotes", "how many miles long is the amadro", {}, ""),
    ("answerable", "q", {"fields": {"answer": "90"}}, ""),
    ("answerable", "q", {"fields": {"answer": "The AMADRO us"}}, "answer not in the passage"),
    ("answerable", "q", {"fields": {"answer": "9"}}, "answer not in the passage"),
    ("answerable", "q", {}, ""),
    ("round_trip", "q", {"hits": (("amadro", 2.0), ("x", 1.0))}, ""),
    ("round_trip", "q", {"hits": (("x", 2.0), ("amadro", 1.0))}, "not found again"),
    ("round_trip", "q", {}, "not found again"),
]  # fmt: skip


@pytest.mark.parametrize("name, query, changes, expected", CASES)
def test_a_filter_rejects_what_it_is_for(corpus, name, query, changes, expected):
    assert reason(corpus, name, draft(query, **changes)) == expected


def test_options_of_filters(corpus):
    hits = (("x", 0.9), ("amadro", 0.6))
    assert reason(corpus, "round_trip", draft("q", hits=hits), k=2) == ""
    assert reason(corpus, "score", draft("q", hits=hits), least=0.7) == "low score of retriever"
    assert reason(corpus, "score", draft("q", scores={"j": {"amadro": 3}}), least=2, of="j") == ""
    assert reason(corpus, "logprob", draft("q", logprob=-2.0), least=-1.0) == "unlikely words"
    assert reason(corpus, "logprob", draft("q"), least=-1.0) == "no log-probability known"
    assert reason(corpus, "answerable", draft("q"), required=True) == "no answer given"
    gains = draft("q", fields={"answer": "90"}, scores={"answer_gain": {"amadro": -0.1}})
    assert reason(corpus, "answerable", gains, least_gain=0.0) == "the passage does not help to answer"


def test_negatives_within_the_margin_are_dropped(corpus):
    given = draft("q", negatives=("a", "b", "c"), labels={"amadro": 5.0, "a": 4.9, "b": 3.0})
    check = make_filters({"false_negatives": {"margin": 1.0}}, corpus)["false_negatives"]
    kept = check(given)
    assert isinstance(kept, Draft) and kept.negatives == ("b", "c")  # c has no score: it stays
    close = draft("q", negatives=("a",), labels={"amadro": 5.0, "a": 4.9})
    assert check(close) == "all negatives may be positives"
    assert reason(corpus, "false_negatives", close, share=0.01) == ""


def test_near_duplicates_are_those_that_a_double_loop_finds():
    rng = random.Random(0)
    words = [f"w{i}" for i in range(14)]
    queries = [" ".join(rng.sample(words, rng.randint(1, 12))) for _ in range(150)]
    for similarity in (0.7, 0.9, 1.0):
        seen, kept = Seen(similarity), []
        for query in queries:
            mine = content_words(query)
            near = any(len(mine & o) >= similarity * len(mine | o) for o in kept)
            assert (seen.find(query) is not None) == near
            if not near:
                seen.add(query, query)
                kept.append(mine)


def test_case_order_and_stop_words_do_not_make_a_query_another():
    seen = Seen()
    seen.add("What is the capital of Chad?", "a")
    assert seen.find("chad: CAPITAL") == "a" and seen.find("What is the capital of Mali?") is None


@pytest.mark.parametrize(
    "given, message",
    [({"lenght": {}}, "must be one of length,"),
     ({"length": {"words": 3}}, "filters.length.words: unknown key; length takes least_words, most_words"),
     ({"score": {}}, "filters.score: .*least"), ({"round_trip": {"of": "x"}}, "must be positive or seed"),
     ({"round_trip": {"k": "x"}}, "filters.round_trip: k: got 'x', expected int"),
     ({"round_trip": {"k": 0}}, "filters.round_trip.k = 0: must be >= 1"),
     ({"round_trip": 3}, "filters.round_trip = 3: must be its options"),
     ({"duplicates": {"similarity": 2}}, r"similarity = 2.0: must be in \(0, 1\]")],
)  # fmt: skip
def test_unknown_filters_and_options_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        make_filters(given, None)


def evaluation(folder, passage="amadro"):
    write_jsonl(folder / "test.jsonl", [{"id": "t1", "question": "How many miles has river Amadro?"}])
    (folder / "qrels.tsv").write_text(f"query-id\tcorpus-id\tscore\nt1\t{passage}\t1\n")
    return EvaluationSet(str(folder / "test.jsonl"), str(folder / "qrels.tsv"))


def test_evaluation_questions_and_their_gold_passages_leak(tmp_path, corpus):
    held = HeldOut([evaluation(tmp_path)], corpus, "nothing")
    assert held.holds(corpus.get("amadro")) and not held.holds(corpus.get("amalmo"))
    text = corpus.get("amadro").text
    assert held.reason(draft("the river Amadro has how many miles"), ["x"]) == "asks an evaluation question"
    assert held.reason(draft("source of it"), [text.upper()]) == "positive is gold in an evaluation set"
    assert held.reason(draft("source of it"), ["x"]) == ""
    allowed = HeldOut([evaluation(tmp_path)], corpus, "passages")
    assert not allowed.holds(corpus.get("amadro")) and allowed.reason(draft("source of it"), [text]) == ""
    assert allowed.reason(draft("the river Amadro has how many miles"), []) == "asks an evaluation question"
    assert (
        HeldOut([evaluation(tmp_path)], corpus, "all").reason(
            draft("the river Amadro has how many miles"), [text]
        )
        == ""
    )


def test_passages_that_are_gold_for_other_questions_of_the_qrels_are_free(tmp_path, corpus):
    given = evaluation(tmp_path)
    with open(tmp_path / "qrels.tsv", "a") as file:
        file.write("train1\tamalmo\t1\n")
    held = HeldOut([given], corpus, "nothing")
    assert held.holds(corpus.get("amadro")) and not held.holds(corpus.get("amalmo"))


def test_qrels_of_another_corpus_are_refused(tmp_path, corpus):
    with pytest.raises(DataError, match="none of its passages is in"):
        HeldOut([evaluation(tmp_path, "unknown")], corpus, "nothing")
