"""The audit of questions against a corpus: the same as a double loop, by set, with yes and no apart."""

import json
import random
from pathlib import Path

import pytest

from data.errors import DataError
from data.jsonl import read_jsonl, write_jsonl
from data.metrics.answerability import answerable, audit, is_closed
from data.metrics.answers import cover_em
from data.records import Passage, Question
from scripts.__main__ import main as sleuth


def world(seed=0):
    draw = random.Random(seed)
    words = ["the", "red", "fox", "sea", "of", "Azov", "x-y", "東京", "a"]
    passages = [Passage(f"p{i}", " ".join(draw.choices(words, k=6)), draw.choice(words)) for i in range(40)]
    golds = [tuple(" ".join(draw.choices(words, k=draw.randint(1, 4))) for _ in range(2)) for _ in range(60)]
    kinds = ["squad", "unicode"]
    return passages, [Question(f"q{i}", "?", g, {"normalizer": kinds[i % 2]}) for i, g in enumerate(golds)]


@pytest.mark.parametrize("seed", range(3))
def test_one_pass_finds_what_a_double_loop_finds(seed):
    passages, questions = world(seed)
    looped = {
        question.id
        for question in questions
        if any(cover_em(f"{p.title} {p.text}", question.gold_answers, question.normalizer) for p in passages)
    }
    assert answerable(questions, passages) == looped
    assert 0 < len(looped) < len(questions)


def test_shares_are_by_set_and_leave_out_yes_and_no():
    questions = [
        Question("1", "?", ("fox",), {"data_source": "a"}),
        Question("2", "?", ("cat",), {"data_source": "a"}),
        Question("3", "?", ("Yes.",), {"data_source": "b"}),
        Question("4", "?", ("fox", "cat"), {"data_source": "b"}),
    ]
    audited = audit(questions, answerable(questions, [Passage("p", "A fox, yes.")]))
    assert (audited["n"], audited["yes_no"], audited["answerable"]["mean"]) == (4, 1, pytest.approx(2 / 3))
    assert {name: of["answerable"]["mean"] for name, of in audited["by_set"].items()} == {"a": 0.5, "b": 1.0}
    assert is_closed(questions[2]) and not is_closed(questions[3])
    with pytest.raises(DataError, match="0 questions"):
        audit([], set())


def test_the_command_writes_what_can_be_answered_and_what_cannot(tmp_path, capsys):
    write_jsonl(tmp_path / "corpus.jsonl", [{"id": "p", "contents": '"Fox"\nIt is red.'}])
    rows = [
        {"id": str(i), "question": "?", "golden_answers": [a]}
        for i, a in enumerate(["red", "blue", "no", "fox"])
    ]
    write_jsonl(tmp_path / "q.jsonl", rows)
    given = ["--questions", str(tmp_path / "q.jsonl"), "--corpus", str(tmp_path / "corpus.jsonl")]
    assert sleuth(["audit", *given, "--out", str(tmp_path / "out")]) == 0
    assert "0.667" in capsys.readouterr().out
    assert [row["id"] for row in read_jsonl(tmp_path / "out" / "answerable.jsonl")] == ["0", "2", "3"]
    assert [row["id"] for row in read_jsonl(tmp_path / "out" / "unanswerable.jsonl")] == ["1"]
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["yes_no"] == 1
    assert sleuth(["audit", *given[:3], str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert sleuth(["audit", *given, "--out", str(tmp_path / "file")]) == 2
    assert "must be a folder, not a file" in capsys.readouterr().err


def test_answers_in_a_script_without_spaces_are_found_with_their_normal_form(tmp_path, capsys):
    write_jsonl(tmp_path / "corpus.jsonl", [{"id": "p", "contents": "中国的首都是北京。"}])
    write_jsonl(tmp_path / "q.jsonl", [{"question": "中国的首都是哪里？", "answer": "北京"}])
    given = ["--questions", str(tmp_path / "q.jsonl"), "--corpus", str(tmp_path / "corpus.jsonl")]
    for normalizer, share in {"squad": "0.000", "unicode": "1.000"}.items():
        assert sleuth(["audit", *given, "--normalizer", normalizer]) == 0
        assert share in (said := capsys.readouterr().out) and said.startswith("1 passage of ")


POOL = Path(__file__).parents[3] / "shared" / "data" / "wiki18_pool"


@pytest.mark.skipif(not POOL.exists(), reason="needs ../shared/data")
def test_of_bamboogle_about_half_can_be_answered_from_the_pool(capsys):
    given = ["--questions", str(POOL / "bamboogle.jsonl"), "--corpus", str(POOL / "corpus.jsonl")]
    assert sleuth(["audit", *given]) == 0
    assert "125" in capsys.readouterr().out
