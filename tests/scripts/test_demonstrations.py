"""`sleuth demonstrations`: a file that `sleuth warm-start` reads, and the questions that are left."""

import json

import pytest

from data.jsonl import read_jsonl, write_jsonl
from data.questions import load_questions
from rl.demonstrations import describe_demonstrations, load_demonstrations, warm_start_notes
from scripts import __main__ as sleuth

CITIES = ("Rome Italy", "Paris France", "Lima Peru", "Oslo Norway", "Cairo Egypt", "Quito Ecuador")


@pytest.fixture
def files(tmp_path):
    from data.corpus import Corpus
    from retriever_server.indexes.bm25 import BM25Index

    pairs = [city.split() for city in CITIES]
    rows = [{"id": c, "title": c, "text": f"{c} is the capital of {country}."} for c, country in pairs]
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    BM25Index.build(Corpus(tmp_path / "corpus.jsonl"), tmp_path / "index")
    asked = [
        {"id": f"q{c}", "question": f"What is the capital of {country}?", "golden_answers": [c]}
        for c, country in pairs
    ]
    write_jsonl(tmp_path / "questions.jsonl", asked)
    return tmp_path


def run(files, *options):
    fixed = [
        "--questions",
        files / "questions.jsonl",
        "--retriever",
        files / "index",
        "--out",
        files / "d.jsonl",
    ]
    return sleuth.main(["demonstrations", *map(str, fixed), *map(str, options)])


def test_demonstrations_and_the_questions_left_over(files, capsys):
    from agent.protocol import COMPACT

    assert run(files, "--take", 4, "--rest", files / "rest.jsonl", "--queries", "random_words") == 0
    assert (
        "4 demonstrations of 4 questions, queries random_words; 2 questions left" in capsys.readouterr().out
    )
    made, left = list(read_jsonl(files / "d.jsonl")), load_questions(str(files / "rest.jsonl"))
    assert {r["id"] for r in made} | {q.id for q in left} == {f"q{c.split()[0]}" for c in CITIES}
    assert len(load_demonstrations(files / "d.jsonl", COMPACT)) == 4
    facts = describe_demonstrations(files / "d.jsonl")
    assert facts["queries"] == {"random_words": 4}
    (files / "warm_start.json").write_text(json.dumps(facts))
    [note] = warm_start_notes(str(files))
    assert note.startswith("4 of the 4 demonstrations of its warm start have queries poor on purpose")


def test_good_queries_are_nothing_to_be_told_of(files):
    assert run(files) == 0
    facts = describe_demonstrations(files / "d.jsonl")
    assert facts["queries"] == {"as given": 6}
    (files / "warm_start.json").write_text(json.dumps(facts))
    assert warm_start_notes(str(files)) == [] == warm_start_notes("org/elsewhere")


def test_answers_in_scripts_without_spaces_are_found_by_their_normalizer(files):
    asked = {"id": "q", "question": "What is the capital of Italy?", "golden_answers": ["罗马"]}
    write_jsonl(files / "questions.jsonl", [asked])
    text = "The capital of Italy, 意大利的首都罗马, lies on the Tiber."
    write_jsonl(files / "corpus.jsonl", [{"id": "c", "title": "Italy", "text": text}])
    index = sleuth.main(["index", f"--corpus={files / 'corpus.jsonl'}", f"--out={files / 'chinese'}"])
    assert index == 0 and run(files, "--retriever", files / "chinese") != 0
    assert run(files, "--retriever", files / "chinese", "--normalizer", "unicode") == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--take", 0], "take = 0: must be >= 1, or none for all"),
        (["--top_k", 0], "top_k = 0: must be >= 1"),
        (["--rest", "r.jsonl"], "rest = r.jsonl: needs take"),
        (["--take", 6, "--rest", "r.jsonl"], "take = 6: leaves none of the 6 questions"),
        (["--questions", "none.jsonl"], "none.jsonl: no such file"),
        (["--queries", "bad"], "queries"),
        (["--teacher.samples", 0], "teacher.samples = 0: must be >= 1"),
        (["--teacher.url", "no url"], "teacher"),
        (["--teacher.timeout_seconds", 0], "teacher.timeout_seconds = 0.0: must be > 0"),
        (["--teacher.samples", 4], "teacher: has options but no url; without --teacher.url rules"),
        (["--out", "."], "out = '.': must be a file, not a folder"),
        (["--retriever", "none"], "none of 6 questions gave a demonstration: no passage that none finds"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(files, options, said, capsys):
    assert run(files, *options) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("sleuth: ") and said in line
    assert not (files / "d.jsonl").exists()
