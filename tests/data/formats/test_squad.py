"""SQuAD's own files: questions with their paragraph, 2.0's without an answer, and the corpus."""

import gzip
import json

import pytest

from data.corpus import Corpus
from data.errors import DataError
from data.formats import search_r1
from data.questions import load_questions
from scripts import __main__ as sleuth


def asked(id_, *answers):
    given = [{"text": text, "answer_start": 0} for text in answers]
    return {"id": id_, "question": f"What is {id_}?", "answers": given}


CONTENT = {
    "version": "v2.0",
    "data": [
        {
            "title": "Super_Bowl_50",
            "paragraphs": [
                {
                    "context": "Denver won.",
                    "qas": [{**asked("a", "Denver", "Denver"), "is_impossible": False}],
                },
                {"context": "Carolina lost.", "qas": [{**asked("b"), "is_impossible": True}]},
            ],
        },
        {"title": "Super_Bowl_50", "paragraphs": [{"context": "It rained.", "qas": [asked("c", "rain")]}]},
    ],
}


@pytest.fixture(params=["2.0", "1.1, version last", "indented", "gz"])
def file(request, tmp_path):
    text = json.dumps(CONTENT, indent=1 if request.param == "indented" else None)
    if request.param.startswith("1.1"):
        text = json.dumps({"data": CONTENT["data"], "version": "1.1"})
    path = tmp_path / ("dev.json.gz" if request.param == "gz" else "dev.json")
    path.write_bytes(gzip.compress(text.encode()) if request.param == "gz" else text.encode())
    return path


def test_questions_have_their_paragraph_and_those_without_an_answer_are_counted(file, caplog):
    questions = load_questions(str(file))
    assert [(q.id, q.gold_answers, q.metadata["supporting_ids"]) for q in questions] == [
        ("a", ("Denver",), ["Super Bowl 50#0"]),
        ("c", ("rain",), ["Super Bowl 50#2"]),
    ]
    assert "1 of 3 questions have no answer (SQuAD 2.0, MuSiQue): left out" in caplog.text
    items = [item for _, item in search_r1.read(file, "train", file.parent)]
    assert [(item.query_id, item.positives) for item in items] == [
        ("a", ("Super Bowl 50#0",)),
        ("c", ("Super Bowl 50#2",)),
    ]


def test_the_paragraphs_become_a_corpus(file, tmp_path):
    out = tmp_path / "corpus.jsonl"
    assert sleuth.main(["corpus", str(file), "--out", str(out)]) == 0
    assert [(p.id, p.title, p.text) for p in Corpus(out)][2] == (
        "Super Bowl 50#2",
        "Super Bowl 50",
        "It rained.",
    )


def test_the_hubs_rows_without_an_answer_are_left_out_too(tmp_path):
    rows = [
        {"id": "a", "question": "Who?", "answers": {"text": ["Ann"], "answer_start": [0]}},
        {"id": "b", "question": "When?", "answers": {"text": [], "answer_start": []}},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert [question.id for question in load_questions(str(tmp_path / "a.json"))] == ["a"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps(CONTENT)[:-9], r"dev\.json: not in SQuAD's form: "),
        (
            '{"data": [{"paragraphs": [{"context": "x"}]}]}',
            r"dev\.json: .* form: paragraph 1: no 'qas'",
        ),
        ('{"data": [5]}', r"dev\.json: not in SQuAD's form: paragraph 0: 'int' object"),
    ],
)
def test_what_is_not_in_the_form_is_said(tmp_path, text, said):
    (tmp_path / "dev.json").write_text(text)
    with pytest.raises(DataError, match=said):
        load_questions(str(tmp_path / "dev.json"))


def test_articles_may_have_no_title(tmp_path):
    paragraphs = [{"context": "It rained.", "qas": [asked("c", "rain")]}]
    content = {"data": [{"title": None, "paragraphs": paragraphs}, {"paragraphs": paragraphs}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    found = load_questions(str(tmp_path / "a.json"))
    assert [question.metadata["supporting_ids"] for question in found] == [["#0"], ["#1"]]
