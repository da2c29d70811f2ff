"""Labels of searches, and the examples made of them, against cases worked out by hand."""

import pytest

from agent.query_styles import QUERY_STYLES
from data.corpus import Corpus
from data.errors import ConfigError, DataError
from data.examples import Examples
from data.jsonl import read_jsonl, write_jsonl
from data.records import Question
from rl.co_training.examples import LabelConfig, mine_trajectories, reasoning_weights
from rl.co_training.labels import LABELLERS, SCORED, label
from rl.co_training.searches import read_searches

CORPUS = {
    "eiffel": "Gustave Eiffel built the tower of Paris in 1889.",
    "born": "Eiffel was born in Dijon, a town of Burgundy.",
    "mustard": "Dijon is famous for its mustard.",
    "cow": "The red cow lives in the north.",
}


def search(query, ids, turn, tool="search", error=None):
    hits = [{"id": id_, "title": "", "text": CORPUS[id_], "score": 1.0, "generation": "g"} for id_ in ids]
    return {"query": query, "hits": hits, "seconds": 0.1, "error": error, "turn": turn, "tool": tool}


def trajectory(searches, texts, answer="Dijon", id="q1", gold=("eiffel", "born")):
    """A compact record: a policy turn for each of `texts`, with as many tokens as words."""
    turns = [{"kind": "policy", "text": text, "tokens": len(text.split())} for text in texts]
    return {
        "format_version": 1, "id": id, "question": "Where was the builder of the tower of Paris born?",
        "gold_answers": ["Dijon"], "metadata": {"supporting_ids": list(gold)} if gold else {},
        "answer": answer, "segments": [{"kind": "prompt", "text": "?", "tokens": 1}, *turns],
        "searches": searches,
    }  # fmt: skip


TWO_HOPS = trajectory(
    [search("tower of Paris", ["eiffel", "cow"], 0), search("Eiffel birth", ["eiffel", "born", "cow"], 1)],
    ["a b", "<think>Gustave Eiffel built the tower</think> so", "done he was born"],
)


def labels_of(record, labeller, tmp_path):
    write_jsonl(tmp_path / "t.jsonl", [record])
    return [{id_: str(kind) for id_, kind in call.items()}
            for call in label(next(iter(read_searches(tmp_path / "t.jsonl"))), labeller)]  # fmt: skip


@pytest.mark.parametrize(
    ("labeller", "expected"),
    [
        ("gold", [{"eiffel": "positive", "cow": "hard"},
                  {"eiffel": "redundant", "born": "positive", "cow": "hard"}]),
        ("answer", [{"eiffel": "unknown", "cow": "unknown"},
                    {"eiffel": "weak", "born": "positive", "cow": "weak"}]),
        ("quote", [{"eiffel": "positive", "cow": "weak"},
                   {"eiffel": "unknown", "born": "unknown", "cow": "unknown"}]),
    ],
)  # fmt: skip
def test_labels_are_those_worked_out_by_hand(labeller, expected, tmp_path):
    assert labels_of(TWO_HOPS, labeller, tmp_path) == expected


def test_an_answer_that_the_question_names_labels_nothing(tmp_path):
    choice = TWO_HOPS | {
        "question": "Is the builder from Paris or Divio?",
        "gold_answers": ["Dijon", "Divio"],
    }
    labels = labels_of(choice, "answer", tmp_path)
    assert {kind for call in labels for kind in call.values()} == {"unknown"}


def test_the_answer_labels_nothing_in_a_wrong_trajectory(tmp_path):
    labels = labels_of(TWO_HOPS | {"answer": "Paris"}, "answer", tmp_path)
    assert {kind for call in labels for kind in call.values()} == {"unknown"}


def test_a_passage_opened_by_number_or_by_id_is_positive_and_the_rest_weak(tmp_path):
    calls = [
        search("tower", ["eiffel", "cow"], 0), search("1", ["eiffel"], 1, "open_page"),
        search("mustard", ["mustard", "born"], 2), search("born", ["born"], 3, "open_page"),
    ]  # fmt: skip
    labels = labels_of(trajectory(calls, ["a"] * 5), "opened", tmp_path)
    assert labels[0] == {"eiffel": "positive", "cow": "weak"}
    assert labels[2] == {"mustard": "weak", "born": "positive"}


def test_pages_that_were_opened_are_no_queries(tmp_path):
    calls = [
        search("tower", ["eiffel", "mustard"], 0), search("1", ["eiffel"], 1, "open_page"),
        search("birth", ["born", "cow"], 2), search("2", ["cow"], 3, "open_page"),
    ]  # fmt: skip
    _, rows = mined([trajectory(calls, ["a"] * 5)], tmp_path, config={"labels": "opened", "style": "history"})
    assert [row["query"].split("\n", 1)[1] for row in rows] == [
        "Query: tower", "Query: birth\nEarlier queries:\n1. tower",
    ]  # fmt: skip


def test_what_is_useful_later_is_no_negative_before(tmp_path):
    calls = [search("a", ["born", "eiffel"], 0), search("b", ["born"], 1)]
    texts = ["x", "gustave eiffel built the tower", "eiffel was born in dijon"]
    first, second = labels_of(trajectory(calls, texts), "quote", tmp_path)
    assert first == {"born": "unknown", "eiffel": "positive"}
    assert second == {"born": "redundant"}


def test_words_of_the_question_are_no_quote(tmp_path):
    record = trajectory([search("the tower of Paris in", ["eiffel"], 0)], ["x", "the tower of Paris in"])
    assert labels_of(record, "quote", tmp_path) == [{"eiffel": "unknown"}]


def test_failed_searches_are_left_out(tmp_path):
    write_jsonl(tmp_path / "t.jsonl", [trajectory([search("a", [], 0, error="down")], ["a"])])
    assert next(iter(read_searches(tmp_path / "t.jsonl"))).calls == ()


def test_a_folder_stands_for_the_trajectories_in_it(tmp_path):
    write_jsonl(tmp_path / "trajectories.jsonl", [TWO_HOPS])
    assert next(read_searches(tmp_path)).place == f"{tmp_path / 'trajectories.jsonl'}:1"


def mined(records, tmp_path, **given):
    write_jsonl(tmp_path / "t.jsonl", records)
    config = LabelConfig(**given.pop("config", {"labels": "gold"}))
    tally = mine_trajectories(tmp_path / "t.jsonl", tmp_path / "out.jsonl", config, **given)
    return tally, list(read_jsonl(tmp_path / "out.jsonl"))


def test_searches_become_examples_that_a_retriever_trains_on(tmp_path):
    tally, rows = mined([TWO_HOPS], tmp_path)
    assert [(row["query"], row["positives"], row["negatives"]) for row in rows] == [
        ("tower of Paris", ["eiffel"], ["cow"]),
        ("Eiffel birth", ["born"], ["eiffel", "cow"]),
    ]
    assert rows[1]["provenance"]["tiers"] == {"eiffel": "redundant", "cow": "hard"}
    assert tally.examples == 2 and tally.labels["positive"] == 2
    write_jsonl(tmp_path / "corpus.jsonl", [{"id": id_, "contents": text} for id_, text in CORPUS.items()])
    corpus = Corpus(tmp_path / "corpus.jsonl")
    assert len(Examples(tmp_path / "out.jsonl", corpus)) == 2
    _, again = mined([TWO_HOPS], tmp_path, corpus=corpus)
    assert again[0]["provenance"]["corpus"] == corpus.content_hash


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"cow": None}, r"t.jsonl:1: passage 'cow' is not in .*corpus.jsonl"),
        ({"cow": "Another."}, r"t.jsonl:1: passage 'cow' has another text in"),
    ],
)
def test_searches_of_another_corpus_are_refused(tmp_path, changed, says):
    rows = [{"id": id_, "contents": text} for id_, text in (CORPUS | changed).items() if text]
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    with pytest.raises(DataError, match=says):
        mined([TWO_HOPS], tmp_path, corpus=Corpus(tmp_path / "corpus.jsonl"))


def test_the_same_file_gives_the_same_bytes(tmp_path):
    mined([TWO_HOPS, TWO_HOPS | {"id": "q2"}], tmp_path)
    first = (tmp_path / "out.jsonl").read_bytes()
    mined([TWO_HOPS, TWO_HOPS | {"id": "q2"}], tmp_path)
    assert (tmp_path / "out.jsonl").read_bytes() == first


def test_the_order_in_which_trajectories_finished_changes_no_byte(tmp_path):
    other = trajectory(
        [search("tower of Paris", ["cow", "eiffel", "mustard"], 0)], ["a", "b c d e"], id="q1~2"
    )
    sample = other | {"metadata": {**other["metadata"], "sample_of": "q1"}}
    found = []
    for records in ([TWO_HOPS, sample, TWO_HOPS | {"id": "q0"}], [TWO_HOPS | {"id": "q0"}, sample, TWO_HOPS]):
        mined(records, tmp_path)
        found.append((tmp_path / "out.jsonl").read_bytes())
    assert found[0] == found[1] and b"q1~2" not in found[0]


def test_a_query_asked_twice_of_one_question_is_one_example(tmp_path):
    other = trajectory([search("tower of Paris", ["cow", "mustard"], 0)], ["a", "b"])
    _, rows = mined([TWO_HOPS, other], tmp_path)
    assert [row["query"] for row in rows] == ["tower of Paris", "Eiffel birth"]
    assert rows[0]["negatives"] == ["cow", "mustard"]


@pytest.mark.parametrize("style", QUERY_STYLES)
def test_an_empty_query_is_no_example_in_any_style(style, tmp_path):
    calls = [search(" ", ["eiffel"], 0), search("birth", ["born"], 1)]
    tally, rows = mined([trajectory(calls, ["a"] * 3)], tmp_path, config={"labels": "gold", "style": style})
    assert len(rows) == 1 and "birth" in rows[0]["query"] and tally.dropped == {"empty queries": 1}


def test_two_questions_of_one_id_stay_two(tmp_path):
    """Join trajectories as of two files."""
    other = TWO_HOPS | {"question": "Who built it?", "gold_answers": ["Eiffel"], "answer": "Eiffel"}
    found = []
    for records in ([TWO_HOPS, other], [other, TWO_HOPS]):
        tally, rows = mined(records, tmp_path)
        assert tally.examples == 4 and {*map(tuple, (row["answers"] for row in rows))} == {
            ("Dijon",), ("Eiffel",),
        }  # fmt: skip
        found.append((tmp_path / "out.jsonl").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "held_out",
    [
        Question("q1", "another text", ("x",)),
        Question("7", "where was  the builder of the tower of paris born?", ()),
    ],
)
def test_held_out_questions_never_contribute(held_out, tmp_path):
    sample = TWO_HOPS | {"id": "q1~2", "metadata": TWO_HOPS["metadata"] | {"sample": 2, "sample_of": "q1"}}
    with pytest.raises(DataError, match=r"2 trajectories with 4 searches give no example.*held-out"):
        mined([TWO_HOPS, sample], tmp_path, held_out=[held_out])


@pytest.mark.parametrize(
    ("style", "expected"),
    [("query", "q"), ("question", "x [SEP] q"),
     ("history", "Question: x\nQuery: q\nEarlier queries:\n1. a\n2. b")],
)  # fmt: skip
def test_styles_of_queries(style, expected):
    assert QUERY_STYLES[style]("x", ["a", "b"], "q") == expected


def test_weights_by_reasoning_are_the_published_formula():
    raw = [1 - 2 ** (-10 / 20), 1 - 2 ** (-20 / 20), 1 - 2 ** (-40 / 20)]
    assert reasoning_weights([10, 20, 40]) == pytest.approx([value / (sum(raw) / 3) for value in raw])
    assert reasoning_weights([0, 0]) == [1.0, 1.0]


def test_names_that_no_table_has_are_refused():
    with pytest.raises(ConfigError, match=r"labels = 'luck': must be one of gold, answer, quote, opened"):
        LabelConfig(labels="luck")
    assert {"gold", "answer", "quote", "opened", *SCORED} == set(LABELLERS)


def test_a_line_that_is_no_trajectory_is_named(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"format_version": 1, "id": "a"}\n')
    with pytest.raises(DataError, match=r"t\.jsonl:1: no trajectory: KeyError 'gold_answers'"):
        list(read_searches(tmp_path / "t.jsonl"))
    whole = trajectory([search("tower", ["eiffel"], 0)], ["a", "b"])
    for odd in ({"gold_answers": "Paris"}, {"metadata": None}):
        write_jsonl(tmp_path / "t.jsonl", [whole | odd])
        with pytest.raises(DataError, match=r"t\.jsonl:1: no trajectory: "):
            list(read_searches(tmp_path / "t.jsonl"))
    (tmp_path / "t.jsonl").write_text('{"id": "a", "question": "x"}\n')
    with pytest.raises(DataError, match=r"t\.jsonl:1: no trajectory, as written by .*fields id, question$"):
        list(read_searches(tmp_path / "t.jsonl"))
