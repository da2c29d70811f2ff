"""`sleuth mine` and `sleuth convert`: from files of pairs to mined negatives, killed in between."""

# pyright: reportOptionalMemberAccess=false

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.corpus import Corpus
from data.errors import ConfigError, DataError
from data.examples import Examples
from data.jsonl import write_jsonl
from retriever_server.indexes.bm25 import BM25Index
from scripts import convert, mine
from tests.retriever_server.training.mined import write_corpus

ROOT = Path(__file__).parents[2]


def run_mine(out, queries=None, retriever=None, **given):
    return mine.main(mine.MineConfig(out=out, queries=queries, retriever=retriever, **given))


@pytest.fixture
def made(tmp_path):
    """A folder with pairs.csv converted, and an index of its passages."""
    animals = ["red fox", "blue fox", "grey wolf", "old grey fox", "sea cow", "red cow"]
    lines = ["question,passage", *(f"where is the {a}?,The {a} lives in the north." for a in animals)]
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    convert.main(str(tmp_path / "pairs.csv"), str(tmp_path), "sentence-transformers")
    BM25Index.build(Corpus(tmp_path / "corpus.jsonl"), tmp_path / "index")
    return tmp_path


def test_pairs_become_examples_with_mined_negatives(made, capsys):
    run_mine(str(made / "mined.jsonl"), str(made / "examples.jsonl"), str(made / "index"), per_query=2)
    said = capsys.readouterr().out
    assert said.startswith(f"6 examples in {made}/mined.jsonl, 2.0 negatives each; 0 have none")
    corpus = Corpus(made / "corpus.jsonl")
    first = Examples(made / "mined.jsonl", corpus)[0]
    assert "red cow" in corpus.get(first.negatives[0]).text or "fox" in corpus.get(first.negatives[0]).text


def test_mined_examples_convert_to_other_formats(made, capsys):
    run_mine(str(made / "mined.jsonl"), str(made / "examples.jsonl"), str(made / "index"), per_query=2)
    convert.main(str(made / "mined.jsonl"), str(made / "bge.jsonl"), target_format="bge")
    first = json.loads((made / "bge.jsonl").read_text().splitlines()[0])
    assert len(first["pos"]) == 1 and len(first["neg"]) == 2
    assert f"6 examples in {made}/bge.jsonl" in capsys.readouterr().out


def test_crops_and_teachers_make_labels(made, capsys):
    index, out = str(made / "index"), str(made / "labels")
    ranks = {"positive_ranks": (1, 1), "negative_ranks": (2, 3)}
    run_mine(out, "crops", teachers=[index, index], **ranks)
    assert f"the last stage is {out}/stage_2.jsonl" in capsys.readouterr().out
    assert len(Examples(made / "labels" / "stage_2.jsonl", Corpus(made / "corpus.jsonl"))) == 6


def test_crops_alone_need_no_retriever(made):
    for corpus in ("corpus.jsonl", "index"):
        run_mine(str(made / "crops.jsonl"), "crops", corpus=str(made / corpus))
        assert len(Examples(made / "crops.jsonl", Corpus(made / "corpus.jsonl"))) == 6


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "--retriever or --teachers must be given"),
        ({"retriever": "a", "teachers": ["b"]}, "give one of them"),
        ({"retriever": "nowhere"}, "must be an http"),
        ({"retriever": "x", "per_query": 0}, "per_query = 0: must be >= 1"),
        ({"teachers": ["x"], "negative_ranks": (5, 6)}, "the negatives after them"),
        ({"retriever": "none"}, "--corpus: must be given"),
    ],
)
def test_wrong_options_are_refused(made, options, message):
    with pytest.raises(ConfigError, match=message):
        run_mine(str(made / "out.jsonl"), str(made / "examples.jsonl"), **options)


def test_a_teacher_is_named_by_a_file(made):
    (made / "teacher.yaml").write_text(
        "class_path: tests.retriever_server.training.mined.Longest\ninit_args: {}\n"
    )
    with pytest.raises(ConfigError, match="Longest"):
        mine._plan(str(made / "teacher.yaml"), scorer=True)
    (made / "teacher.yaml").write_text("class_path: tests.retriever_server.training.mined.Lengths\n")
    assert mine._plan(str(made / "teacher.yaml"), scorer=True)().name == "numbers"
    (made / "teacher.yaml").write_text("class_path: [")
    with pytest.raises(ConfigError, match=r"teacher.yaml, line 1: not YAML"):
        mine._plan(str(made / "teacher.yaml"), scorer=True)


def test_a_broken_line_is_named(made):
    with (made / "examples.jsonl").open("a") as file:
        file.write('{"query": "torn')
    with pytest.raises(DataError, match=r"examples.jsonl:7: not valid JSON"):
        run_mine(str(made / "out.jsonl"), str(made / "examples.jsonl"), str(made / "index"))


def test_convert_is_from_ours_or_to_ours(made):
    with pytest.raises(ConfigError, match="one of them must be sleuth, and not both"):
        convert.main(str(made / "examples.jsonl"), str(made / "out"))
    write_jsonl(made / "elsewhere" / "examples.jsonl", [{"query": "q", "positives": ["0"]}])
    with pytest.raises(ConfigError, match="--corpus: must be given, as there is no"):
        convert.main(str(made / "elsewhere" / "examples.jsonl"), str(made / "out"), target_format="bge")


@pytest.mark.slow
def test_killed_with_no_warning_it_goes_on_to_the_same_bytes(tmp_path):
    corpus = write_corpus(tmp_path)
    rows = [{"query": str(i % 30), "positives": [str(i % 30)]} for i in range(300)]
    write_jsonl(tmp_path / "examples.jsonl", rows)
    node = "class_path: tests.retriever_server.training.mined.Numbered\n"
    node += "init_args: {corpus: %s, seconds: %s}\n"
    for name, seconds in (("slow", 0.5), ("fast", 0)):
        (tmp_path / f"{name}.yaml").write_text(node % (corpus.path, seconds))
    given = {"queries": str(tmp_path / "examples.jsonl"), "corpus": str(corpus.path)}
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    options = [f"--{key}={value}" for key, value in given.items()]
    command = [sys.executable, "-m", "scripts", "mine", *options, "--out", str(out)]
    process = subprocess.Popen([*command, "--retriever", str(tmp_path / "slow.yaml")], cwd=ROOT)
    while not (part.exists() and part.stat().st_size) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not out.exists()
    done = part.read_bytes().count(b"\n")
    assert 0 < done < 300
    run_mine(out=str(out), retriever=str(tmp_path / "fast.yaml"), **given)
    run_mine(out=str(tmp_path / "whole.jsonl"), retriever=str(tmp_path / "fast.yaml"), **given)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(Examples(out, corpus)) == 300


def test_crops_of_a_script_without_spaces_are_made_and_none_at_all_is_an_error(tmp_path, capsys):
    texts = [
        "サギは浅い水の中で魚を待つ鳥である。長い首と長い足を持つ。",
        "氷河は谷をゆっくりと下る氷の流れである。",
    ]
    write_jsonl(tmp_path / "ja.jsonl", [{"id": str(i), "text": text} for i, text in enumerate(texts)])
    run_mine(str(tmp_path / "crops.jsonl"), "crops", corpus=str(tmp_path / "ja.jsonl"))
    corpus = Corpus(tmp_path / "ja.jsonl")
    examples = Examples(tmp_path / "crops.jsonl", corpus)
    assert len(examples) == 2 and all(e.query in corpus.get(e.positives[0]).text for e in examples)
    write_jsonl(tmp_path / "short.jsonl", [{"id": "1", "text": "Too short."}])
    with pytest.raises(DataError, match=r"short\.jsonl: no passage has a sentence long enough"):
        run_mine(str(tmp_path / "none.jsonl"), "crops", corpus=str(tmp_path / "short.jsonl"))
    assert not (tmp_path / "none.jsonl").exists()
