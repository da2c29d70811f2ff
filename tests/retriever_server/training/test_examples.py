"""Examples: lines of ids checked against their corpus, and the columns that trainers read."""

import json
import pickle

import pytest

from data.corpus import Corpus
from data.errors import ConfigError, DataError
from data.examples import Examples, parse_example
from data.jsonl import write_jsonl
from retriever_server.training.examples import as_dataset


@pytest.fixture
def corpus(tmp_path):
    rows = [{"id": f"p{i}", "title": f"T{i}", "text": f"text {i}"} for i in range(12)]
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    return Corpus(tmp_path / "corpus.jsonl")


def load(tmp_path, corpus, *rows, **options):
    write_jsonl(tmp_path / "examples.jsonl", rows)
    return Examples(tmp_path / "examples.jsonl", corpus, **options)


def row(i=0, **fields):
    return {"query_id": f"q{i}", "query": f"query {i}", "positives": [f"p{i}"], **fields}


def test_a_line_says_what_its_example_says(tmp_path, corpus):
    full = row(negatives=["p1", "p2"], scores={"p0": 2.5}, answers=["a"], provenance={"generation": "g"})
    examples = load(tmp_path, corpus, row(3), full)
    assert len(examples) == 2 and examples[0].query == "query 3" and examples[-1].as_record() == full
    assert [example.query_id for example in examples[:2]] == ["q3", "q0"]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"query": "q", "positives": []}, "query 'q' has no positive"),
        ({"query": " \n", "positives": ["p1"]}, 'no "query" and no "query_image", or an empty one'),
        ({"query": "q", "positives": ["nowhere"]}, "passage 'nowhere' is not in"),
        ({"query": "q", "positives": ["p1"], "negatives": ["p2", "no"]}, "passage 'no' is not in"),
        ({"query": "q", "positives": ["p1"], "negatives": ["p1"]}, "a positive and a negative"),
        ({"query": "q", "positives": ["p1", "p1"]}, "'p1' stands there twice"),
        ({"query": "q", "positives": [["p1"]]}, '"positives" must be a string, found'),
        ({"query": "q", "positives": [False]}, '"positives" must be a string, found false'),
        (
            {"query": "q", "positives": ["p1"], "scores": {"p1": "high"}},
            '"scores" must be a number, found "high"',
        ),
        ({"query": "q", "positives": ["p1"], "scores": {"p1": float("nan")}}, '"scores" holds nan'),
        ({"query": "q", "positives": ["p1"], "pos": []}, 'unknown key "pos"'),
        ({"query_id": "q0", "query": "q", "positives": ["p1"]}, "'q0' stands there twice"),
    ],
)
def test_a_wrong_example_is_named_or_left_out(tmp_path, corpus, wrong, message):
    with pytest.raises(DataError, match=f"examples.jsonl:2: .*{message}"):
        load(tmp_path, corpus, row(), wrong)
    kept = load(tmp_path, corpus, row(), wrong, row(5), on_error="skip")
    assert [example.query_id for example in kept] == ["q0", "q5"] and kept.skipped == 1


def test_a_broken_line_is_named_whatever_on_error_says(tmp_path, corpus):
    path = tmp_path / "examples.jsonl"
    path.write_text(json.dumps(row()) + "\n\n" + '{"query": "cut of')
    with pytest.raises(DataError, match=r"examples.jsonl:3: not valid JSON"):
        Examples(path, corpus, on_error="skip")


def test_a_changed_corpus_is_refused_by_its_hash(tmp_path, corpus):
    rows = [row(provenance={"corpus": corpus.content_hash})]
    load(tmp_path, corpus, *rows)
    with corpus.path.open("a") as file:
        file.write('{"id": "new", "text": "one more"}\n')
    with pytest.raises(DataError, match=f"of hash {corpus.content_hash}, but .* has .*changed since"):
        load(tmp_path, Corpus(corpus.path), *rows, on_error="skip")


@pytest.mark.parametrize("content", ["", "\n"])
def test_a_file_without_examples_is_refused(tmp_path, corpus, content):
    (tmp_path / "none.jsonl").write_text(content)
    with pytest.raises(DataError, match="holds no examples"):
        Examples(tmp_path / "none.jsonl", corpus)
    with pytest.raises(DataError, match="No such file"):
        Examples(tmp_path / "nowhere.jsonl", corpus)


def test_repeated_queries_are_counted_and_kept(tmp_path, corpus, caplog):
    examples = load(tmp_path, corpus, row(), {**row(1), "query": "query 0"})
    assert len(examples) == 2 and examples.repeated == 1
    assert "queries with the text of another: 1" in caplog.text


def test_tuples_have_the_columns_of_sentence_transformers(tmp_path, corpus):
    rows = [row(i, negatives=["p8", "p9"], scores={f"p{i}": 3, "p8": 1, "p9": 2}) for i in range(3)]
    examples = load(tmp_path, corpus, *rows)
    found = as_dataset(examples, lambda passage: f"<{passage.text}>", negatives=2, labels=True)
    assert found[1] == {
        "anchor": "query 1",
        "positive": "<text 1>",
        "negative_1": "<text 8>",
        "negative_2": "<text 9>",
        "label": [3.0, 1.0, 2.0],
    }
    assert len(found) == 3 and found.column_names == list(found[0])
    assert found.data.nbytes < 3 * 3 * 100  # positions and scores; no text is copied


def test_pairs_and_lists_label_the_positive(tmp_path, corpus):
    examples = load(tmp_path, corpus, row(negatives=["p8", "p9"]), row(1, negatives=["p9"]))
    pairs = as_dataset(examples, negatives=2, form="pair")
    assert [(p["passage"][:2], p["label"]) for p in pairs] == [
        ("T0", 1), ("T8", 0), ("T9", 0), ("T1", 1), ("T9", 0),
    ]  # fmt: skip
    lists = as_dataset(examples, negatives=2, form="list")
    assert [len(each["docs"]) for each in lists] == [3, 2] and lists[1]["label"] == [1, 0]


def test_each_draw_has_another_positive_and_other_negatives(tmp_path, corpus):
    examples = load(tmp_path, corpus, row(positives=["p0", "p1"], negatives=["p4", "p5", "p6"]))
    found = as_dataset(examples, lambda passage: passage.id, negatives=2, draws=3)
    assert [(f["positive"], f["negative_1"], f["negative_2"]) for f in found] == [
        ("p0", "p4", "p5"), ("p1", "p6", "p4"), ("p0", "p5", "p6"),
    ]  # fmt: skip


def test_missing_negatives_are_filled_with_other_passages(tmp_path, corpus):
    examples = load(tmp_path, corpus, row(positives=["p0", "p1"], negatives=["p2"]))
    found = as_dataset(examples, lambda passage: passage.id, negatives=9)
    drawn = list(found[0].values())[1:]
    assert len(set(drawn)) == 10 and drawn[:2] == ["p0", "p2"] and "p1" not in drawn
    assert found[0] == as_dataset(examples, lambda passage: passage.id, negatives=9)[0]
    with pytest.raises(DataError, match="12 passages are too few for 11 negatives"):
        as_dataset(examples, negatives=11)


def test_examples_without_enough_scores_are_left_out_and_counted(tmp_path, corpus, caplog):
    rows = [row(negatives=["p8"], scores={"p0": 1, "p8": 0}), row(1, negatives=["p8"], scores={"p1": 1})]
    examples = load(tmp_path, corpus, *rows)
    assert len(as_dataset(examples, negatives=1, labels=True)) == 1
    assert "1 of 2 examples have too few passages with a score" in caplog.text
    with pytest.raises(DataError, match="no example has a score for a positive and 2 negatives"):
        as_dataset(examples, negatives=2, labels=True)


def test_oversized_texts_are_cut_before_the_tokenizer(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", [{"id": "p0", "text": "x" * 500_000}])
    examples = load(tmp_path, Corpus(tmp_path / "corpus.jsonl"), {**row(), "query": "y" * 500_000})
    [found] = as_dataset(examples)
    assert {name: len(text) for name, text in found.items()} == {"anchor": 100_000, "positive": 100_000}


def test_a_data_set_reaches_another_process(tmp_path, corpus):
    found = as_dataset(load(tmp_path, corpus, row()))
    assert pickle.loads(pickle.dumps(found))[0] == found[0]


def test_wrong_options_are_refused(tmp_path, corpus):
    examples = load(tmp_path, corpus, row())
    with pytest.raises(ConfigError, match="negatives = -1"):
        as_dataset(examples, negatives=-1)
    with pytest.raises(ConfigError, match="form = 'triplet': must be one of tuple, pair, list"):
        as_dataset(examples, form="triplet")  # type: ignore[arg-type]


def test_numbers_as_ids_are_taken_as_strings():
    assert parse_example({"query": "q", "positives": [7]}).positives == ("7",)
