"""Training data of other projects: columns by name, ids that are 0, one text where lists are due."""

import json
from pathlib import Path

import pytest

from data.errors import DataError
from data.formats import beir, bge, dpr, msmarco, pairs, search_r1, tevatron
from data.formats.training import query_ids, text_id
from data.jsonl import write_jsonl
from data.records import Example, Passage


def read(format_read, path, *rows, split="train"):
    """The passages by id, and the examples."""
    if rows:
        write_jsonl(path, rows)
    items = [item for _, item in format_read(Path(path), split, Path(path).parent / "images")]
    passages = {item.id: item for item in items if isinstance(item, Passage)}
    return passages, [item for item in items if isinstance(item, Example)]


def texts(format_read, path, *rows):
    """Query, texts of its positives, texts of its negatives, of each example."""
    passages, examples = read(format_read, path, *rows)
    sides = ([[passages[i].text for i in ids] for ids in (e.positives, e.negatives)] for e in examples)
    return [(example.query, *side) for example, side in zip(examples, sides, strict=True)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"anchor": "q", "negative": "bad", "positive": "good"}, ("q", ["good"], ["bad"])),
        ({"positive": "good", "anchor": "q"}, ("q", ["good"], [])),
        ({"id": 5, "question": "q", "answer": "good"}, ("q", ["good"], [])),
        ({"_id": "x", "passage": "good", "query": "q", "passage_id": 0}, ("q", ["good"], [])),
        ({"query": "q", "document": "good", "label": 1, "qid": 3}, ("q", ["good"], [])),
        (
            {"negative_2": "c", "Negative-1": "b", "Positive": "good", "Query": "q"},
            ("q", ["good"], ["c", "b"]),
        ),
        ({"query": "q", "pos": ["good", "fine"], "neg": "bad"}, ("q", ["good", "fine"], ["bad"])),
        ({"sentence2": "good", "sentence1": "q", "score": 0.7, "idx": 0}, ("q", ["good"], [])),
        ({"query": "q", "positive": '["a", "b"]', "negative": None}, ("q", ['["a", "b"]'], [])),
    ],
)
def test_columns_of_pairs_go_by_their_names(tmp_path, row, expected):
    assert texts(pairs.read, tmp_path / "a.jsonl", row) == [expected]


@pytest.mark.parametrize(
    "columns",
    ["title, abstract", "query, text, passage", "query, question, positive", "positive, negative", "query",
     "query, negative", "query, positive, source", "query, positive, answer",
     "anchor, positive, score, label"],
)  # fmt: skip
def test_unclear_columns_are_refused_with_their_names(tmp_path, columns):
    row = dict.fromkeys(columns.split(", "), "x")
    with pytest.raises(DataError, match=rf"a.jsonl:1: columns {columns}: must be one of anchor"):
        read(pairs.read, tmp_path / "a.jsonl", row)


def test_labels_are_scores_only_as_a_list(tmp_path):
    row = {"anchor": "q", "positive": "good", "negative": "bad"}
    rows = [row | {"label": [2.0, "1"]}, row | {"label": "[2, 1]"}, row | {"label": "1"}]
    _, examples = read(pairs.read, tmp_path / "a.jsonl", *rows)
    assert [list((example.scores or {}).values()) for example in examples] == [[2.0, 1.0], [2.0, 1.0], []]
    for label, wrong in (
        (float("nan"), "holds nan"),
        (0, "label 0: must be > 0"),
        ([1], "1 scores for 2"),
        ("x", '"x"'),
    ):
        with pytest.raises(DataError, match=rf"a.jsonl:1: .*{wrong}"):
            read(pairs.read, tmp_path / "a.jsonl", row | {"label": label})


def test_one_text_is_one_passage_and_never_its_letters(tmp_path):
    path = tmp_path / "a.jsonl"
    assert texts(bge.read, path, {"query": "q", "pos": "text", "neg": "other"}) == [
        ("q", ["text"], ["other"])
    ]
    row = {"query": "q", "positive_passages": "text", "negative_passages": {"docid": 0, "text": "zero"}}
    assert texts(tevatron.read, path, row) == [("q", ["text"], ["zero"])]
    row = {"question": "q", "answers": "Rome", "positive_ctxs": {"title": "T", "text": "text"}}
    assert texts(dpr.read, path, row) == [("q", ["text"], [])]
    assert read(dpr.read, path, row)[1][0].answers == ("Rome",)


@pytest.mark.parametrize("wrong", [7, [7], [["a"]], [None], True, {"id": 1}])
def test_what_is_no_passage_is_refused_by_line(tmp_path, wrong):
    with pytest.raises(DataError, match=r'a.jsonl:1: "pos" must be texts or objects with "text"'):
        read(bge.read, tmp_path / "a.jsonl", {"query": "q", "pos": wrong})


def test_the_id_0_is_kept_in_every_format(tmp_path):
    zero = {"docid": 0, "text": "zero"}
    passages, [example] = read(
        tevatron.read, tmp_path / "a.jsonl", {"query_id": 0, "query": "q", "positive_passages": [zero]}
    )
    assert (list(passages), example.query_id, example.positives) == (["0"], "0", ("0",))
    row = {"question": "q", "positive_ctxs": [{"passage_id": 0, "psg_id": 9, "text": "zero"}]}
    assert list(read(dpr.read, tmp_path / "b.jsonl", row)[0]) == ["0"]
    folder = tmp_path / "v2"
    write_jsonl(folder / "corpus.jsonl", [zero])
    write_jsonl(folder / "train.jsonl", [{"query_id": 0, "query_text": "q", "positive_document_ids": [0.0]}])
    passages, [example] = read(tevatron.read_folder, folder)
    assert (list(passages), example.query_id, example.positives) == (["0"], "0", ("0",))
    row = {"id": 0, "question": "q", "answer": 3.0, "metadata": {"supporting_ids": "13"}}
    [example] = read(search_r1.read, tmp_path / "c.jsonl", row)[1]
    assert (example.query_id, example.positives, example.answers) == ("0", ("13",), ("3",))


def write_beir(folder, passages, queries, qrels):
    write_jsonl(folder / "corpus.jsonl", passages)
    write_jsonl(folder / "queries.jsonl", queries)
    (folder / "qrels").mkdir()
    (folder / "qrels" / "train.tsv").write_text(f"query-id\tcorpus-id\tscore\n{qrels}")
    return folder


def test_beir_has_ids_that_are_0_titles_alone_and_null_texts(tmp_path):
    rows = [
        {"_id": 0, "text": "zero"},
        {"_id": 1, "title": "Heron", "text": None},
        {"_id": 2.0, "title": "Owl"},
        {"_id": "3", "title": None, "text": "three"},
        {"_id": 4, "title": "", "text": None},
    ]
    queries = [{"_id": 0, "text": "q"}, {"_id": 1, "text": "r"}]
    passages, examples = read(beir.read, write_beir(tmp_path / "b", rows, queries, "0\t1\t1\n1\t0\t1\n"))
    assert {p.id: (p.title, p.text) for p in passages.values()} == {
        "0": ("", "zero"), "1": ("", "Heron"), "2": ("", "Owl"), "3": ("", "three"), "4": ("", ""),
    }  # fmt: skip
    assert [(e.query_id, e.positives) for e in examples] == [("0", ("1",)), ("1", ("0",))]


def test_beir_passages_keep_their_metadata_and_files(tmp_path):
    row = {"_id": "a", "title": "T", "text": "x", "metadata": {"year": 1999}, "image": "p.png"}
    folder = write_beir(tmp_path / "b", [row], [{"_id": "q", "text": "q"}], "q\ta\t1\n")
    passage = read(beir.read, folder)[0]["a"]
    assert passage == Passage("a", "x", "T", {"year": 1999}, str(folder / "p.png"))


@pytest.mark.parametrize("id_", [None, "", False, float("nan"), 1.5, ["a"]])
def test_a_wrong_id_of_beir_is_refused_by_line(tmp_path, id_):
    folder = write_beir(tmp_path / "b", [{"_id": "a", "text": "x"}, {"_id": id_, "text": "y"}],
                        [{"_id": "q", "text": "q"}], "q\ta\t1\n")  # fmt: skip
    with pytest.raises(DataError, match=r'corpus.jsonl:2: .*"id"'):
        read(beir.read, folder)


def test_tables_of_queries_may_have_a_header_and_ids_with_blanks(tmp_path):
    (tmp_path / "q.tsv").write_text('\ufeffquery_id\ttext\r\nq 1\t"why" me\r\n0\tzero\tand more\r\n')
    queries = beir.load_queries(tmp_path / "q.tsv")
    assert [(query.id, query.text) for query in queries] == [("q 1", '"why" me'), ("0", "zero\tand more")]


def test_queries_have_their_gold_answers_whole(tmp_path):
    write_jsonl(
        tmp_path / "q.jsonl",
        [{"_id": 0, "text": "q", "answers": "Rome"}, {"id": 1, "query": "r", "answer": 3.0}],
    )
    assert [query.gold_answers for query in beir.load_queries(tmp_path / "q.jsonl")] == [("Rome",), ("3",)]
    write_jsonl(tmp_path / "q.jsonl", [{"_id": 0, "text": "q", "metadata": "m"}])
    with pytest.raises(DataError, match=r'q.jsonl:1: "metadata" must be an object'):
        beir.load_queries(tmp_path / "q.jsonl")


def test_triples_of_texts_may_start_with_quotes(tmp_path):
    (tmp_path / "t.tsv").write_text('"a\tgood\tbad\n"b\t"fine\tbad"\n')
    assert texts(msmarco.read, tmp_path / "t.tsv") == [('"a', ["good"], ["bad"]), ('"b', ['"fine'], ['bad"'])]


def test_a_passage_without_an_id_goes_by_its_text(tmp_path):
    rows = [{"query": "q", "positive_passages": [{"docid": None, "title": "T", "text": "x"}]}]
    assert list(read(tevatron.read, tmp_path / "a.jsonl", *rows)[0]) == [text_id("T", "x")]


def test_an_example_without_a_query_id_gets_one_that_no_other_has():
    given = [Example("a", ("1",)), Example("b", ("1",), query_id="row-0"), Example("c", ("1",), query_id="0")]
    assert query_ids(given) == ["row-0'", "row-0", "0"]


def test_rows_of_arrays_and_parquet_are_read_by_every_format(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {"query": "q", "pos": ["good"], "neg": ["bad"]}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    for name in ("a.json", "a.parquet"):
        assert texts(bge.read, tmp_path / name) == [("q", ["good"], ["bad"])]
