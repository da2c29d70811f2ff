"""Question sets as their makers hand them out: each row in the form of all others, or refused in one line."""

import csv
import json

import pytest

from data.errors import DataError
from data.questions import load_questions

TRIVIA = {"Value": "Sunset Boulevard", "Aliases": ["Sunset Blvd"], "NormalizedValue": "sunset boulevard"}
LINES = {
    "kilt": (
        {"id": "-5", "input": "who?", "output": [{"answer": "Coldplay"}, {"provenance": []}], "meta": {}},
        ("-5", "who?", ("Coldplay",), None),
    ),
    "triviaqa": (
        {"question": "q?", "question_id": "tc_1", "answer": {"value": "Rome", "aliases": ["Roma", "Rome"]}},
        ("tc_1", "q?", ("Rome", "Roma"), None),
    ),
    "hotpotqa": (
        {
            "_id": "5a8b",
            "question": "q?",
            "answer": "yes",
            "type": "comparison",
            "supporting_facts": [["A", 0]],
        },
        ("5a8b", "q?", ("yes",), "comparison"),
    ),
    "musique": (
        {"id": "2hop__1", "question": "q?", "answer": "A", "answer_aliases": ["B", "A"], "answerable": True},
        ("2hop__1", "q?", ("A", "B"), None),
    ),
    "popqa": (
        {"id": 7, "question": "q?", "possible_answers": '["politician", "pol"]', "obj": "politician"},
        ("7", "q?", ("politician", "pol"), None),
    ),
    "with what a model wrote": (
        {"id": "1", "question": "q?", "input": "a prompt", "output": "text", "answer": "A"},
        ("1", "q?", ("A",), None),
    ),
}


def seen(question):
    return question.id, question.text, question.gold_answers, question.metadata.get("kind")


@pytest.mark.parametrize("name", LINES)
def test_a_line_of_a_well_known_set_is_read_with_its_id_and_all_its_answers(name, tmp_path):
    row, expected = LINES[name]
    (path := tmp_path / "dev.jsonl").write_text(json.dumps(row))
    assert [seen(question) for question in load_questions(str(path))] == [expected]


def test_triviaqas_own_file_is_read(tmp_path):
    rows = [{"Question": f"q{i}?", "QuestionId": f"tc_{i}", "Answer": TRIVIA} for i in range(2)]
    whole = {"Data": rows, "Domain": "unfiltered-web", "VerifiedEval": False, "Version": 1.0}
    (path := tmp_path / "unfiltered-web-dev.json").write_text(json.dumps(whole, indent=4))
    found = load_questions(str(path))
    assert [question.id for question in found] == ["tc_0", "tc_1"]
    assert found[0].gold_answers == ("Sunset Boulevard", "Sunset Blvd")


def test_a_question_of_musique_without_an_answer_is_left_out(tmp_path):
    rows = [
        {"id": "a", "question": "q?", "answer": "A", "answerable": answerable} for answerable in (True, False)
    ]
    (path := tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(load_questions(str(path))) == 1


def test_cells_that_pandas_quoted_in_tsv_are_read_without_their_quotes(tmp_path):
    lines = [
        "id\tquestion\tpossible_answers",
        '1\t"a ""b"" c?"\t"[""politician"", ""pol""]"',
        '2\t"x"\t["y"]',
    ]
    (path := tmp_path / "test.tsv").write_text("\n".join(lines) + "\n")
    found = load_questions(str(path))
    assert [(q.text, q.gold_answers) for q in found] == [
        ('a "b" c?', ("politician", "pol")),
        ('"x"', ("y",)),
    ]


def test_metadata_that_python_wrote_are_read(tmp_path):
    path = tmp_path / "simpleqa.csv"
    with path.open("w", newline="") as file:
        told = {"topic": "Art", "answer_type": "Date", "urls": ["https://b'c"]}
        csv.writer(file).writerows([["metadata", "problem", "answer"], [str(told), "When?", "2010"]])
    [question] = load_questions(str(path))
    assert question.gold_answers == ("2010",)
    assert {**told, "kind": "Art"}.items() <= question.metadata.items()


@pytest.mark.parametrize(
    "row",
    [
        {"query_id": "7", "query": "gAAAAABk3s9Jx0c2VwQz+A==", "answer": "x7Wd8fBfYQ==", "evidence_docs": []},
        {"problem": "gAAAAABk3s9Jx0c2VwQz+A==", "answer": "x7Wd8fBfYQ==", "canary": "BROWSECOMP:1"},
    ],
)
def test_an_encrypted_set_is_refused(row, tmp_path):
    (path := tmp_path / "dev.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"dev.jsonl:1: the question is encrypted: decrypt the set"):
        load_questions(str(path))


def test_a_packed_file_is_refused_with_what_is_read(tmp_path):
    (tmp_path / "dev.jsonl.zst").write_bytes(b"(\xb5/\xfd")
    with pytest.raises(DataError, match=r"unknown kind of file; .* are read, those of text also in .gz"):
        load_questions(str(tmp_path / "dev.jsonl.zst"))
