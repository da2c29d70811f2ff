"""Judgements and rankings in tables: headers by their words, ids with blanks, every wrong line."""

import pytest

from data.errors import DataError
from data.formats.trec import load_qrels, load_run, write_run
from data.records import Hit, Passage

HEADER = "query-id\tcorpus-id\tscore\n"


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    "text",
    [
        f"{HEADER}q1\td1\t1\nq2\td2\t1\n",
        "corpus-id\tquery-id\tscore\nd1\tq1\t1\nd2\tq2\t1\n",
        "score\tcorpus_id\tquery_id\n1\td1\tq1\n1\td2\tq2\n",
        "qid iter docno rel\nq1 0 d1 1\nq2 0 d2 1\n",
        "docid iteration relevance topic\nd1 0 1 q1\nd2 7 1 q2\n",
        "\n\nQuery-ID\tCorpus-ID\tScore\r\nq1\td1\t1\r\nq2\td2\t1\r\n",
        "\ufeffq1 0 d1 1\nq2 Q0 d2 +1\n",
        f"\ufeff{HEADER}q1\td1\t1\nq2\td2\t1",
        "q1\td1\t1\nq2\td2\t1\n",
        "q1 0 d1 1\nq1\t0\td1\t1\nq2 0 d2 1\n",
    ],
)
def test_judgements_are_read_by_the_names_of_their_columns(tmp_path, text):
    assert load_qrels(write(tmp_path / "qrels", text)) == {"q1": {"d1": 1}, "q2": {"d2": 1}}


def test_other_tables_of_judgements_are_read(tmp_path):
    expected = {"q 1": {"d,1": 1}}
    assert load_qrels(write(tmp_path / "a.csv", 'query-id,corpus-id,score\nq 1,"d,1",1\n')) == expected
    assert load_qrels(write(tmp_path / "a.tsv", f"{HEADER}q 1\td,1\t1\n", "utf-16")) == expected
    assert load_qrels(write(tmp_path / "b.tsv", "q 1\t0\td,1\t1\nq 1\t0\td,1\t01\n")) == expected


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("q1 0 d1 1.0\nq2 0 d2 1\n", ":1: relevance '1.0': must be a whole number"),
        ("q1 0 d1 high\nq2 0 d2 1\n", ":1: relevance 'high'"),
        ("query\tdocument\tannotator\nq1\td1\t1\n", ":1: relevance 'annotator'"),
        ("query-id corpus-id\nq1 d1\n", ":1: 2 fields, expected 3 or 4"),
        (f"{HEADER}q1\td1\t0.5\n", ":2: relevance '0.5'"),
        ("q1 0 d1 \u00b2\n", ":1: relevance '\u00b2'"),
        ("q1 0 d1 nan\n", ":1: relevance 'nan'"),
        ("q1 0 d1 3000000000\n", ":1: relevance '3000000000': must be a whole number of at most 1,000,000"),
        ("q1 0 d1 -99999999999999999999\n", ":1: relevance '-9999999"),
        (
            f"{HEADER}q1\td1\t1\nq1\td1\t0\n",
            ":3: passage 'd1' has relevance 1 for query 'q1' already, here 0",
        ),
        ("q1 1 d1 1\nq1 2 d1 0\n", ":2: passage 'd1' has relevance 1"),
        ("q1 Grey heron 1\n", ":1: 4 fields, the second 'Grey': ids with blanks need tabs"),
        ("q1\t\t1\n", ":1: a judgement without the id"),
        (f"{HEADER}q1\td1\n", ":2: 2 fields, expected 3"),
        (f"{HEADER}q1\t0\td1\t1\n", ":2: 4 fields, expected 3"),
        ("q1 0 d1 1 extra\n", ":1: 5 fields, expected 3 or 4"),
        (HEADER, ": no judgements"),
    ],
)
def test_a_wrong_judgement_is_refused_by_its_line(tmp_path, text, wrong):
    path = write(tmp_path / "qrels", text)
    with pytest.raises(DataError) as caught:
        load_qrels(path)
    assert str(caught.value).startswith(f"{path}{wrong}")


def test_ids_with_blanks_stand_in_tables_with_tabs(tmp_path):
    run = write(tmp_path / "a.run", "q 1\tQ0\tGrey heron\t1\t2.5\tmy run\nq 1\tQ0\theron 2\t2\t1\tmy run\n")
    assert [hit.passage.id for hit in load_run(run)["q 1"]] == ["Grey heron", "heron 2"]


@pytest.mark.parametrize(
    "line",
    [
        "q1 Q0 Grey heron 1 2.0 x",
        "q 1 Q0 d1 1 2.0 x",
        "q1 Q0 heron 7 1 2.0 x",
        "q1 Q0 the grey heron 1 2.0 x",
    ],
)
def test_a_run_whose_ids_have_blanks_between_blanks_is_refused(tmp_path, line):
    with pytest.raises(DataError, match=r"a.run:1: \d fields, expected 6: ids with blanks need tabs"):
        load_run(write(tmp_path / "a.run", f"{line}\n"))


def test_a_mark_and_windows_line_ends_lose_no_query(tmp_path):
    run = load_run(write(tmp_path / "a.run", "\ufeffq1 Q0 d1 1 2 x\r\nq2 Q0 d1 1 2 x\r\n"))
    assert list(run) == ["q1", "q2"] and run["q2"][0].generation == "x"


@pytest.mark.parametrize("id_", ["a\tb", "a\nb", "a\rb", "\ud83d"])
def test_ids_that_a_table_cannot_hold_are_refused_by_name(tmp_path, id_):
    with pytest.raises(DataError, match="a table cannot hold it") as caught:
        write_run(tmp_path / "a.run", {"q": [Hit(Passage(id_, ""), 1.0, "g")]}, "g")
    assert repr(id_) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_score_that_is_no_number_is_not_written(tmp_path):
    with pytest.raises(DataError, match='"score" holds nan'):
        write_run(tmp_path / "a.run", {"q": [Hit(Passage("d", ""), float("nan"), "g")]}, "g")
