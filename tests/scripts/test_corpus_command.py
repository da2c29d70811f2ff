"""`sleuth corpus` as a command: a folder of documents becomes a corpus that indexes."""

import bz2
import gzip
import json

import datasets
import pyarrow.parquet
import pytest

from data.corpus import Corpus
from scripts import __main__ as sleuth
from scripts.console import Bar
from tests.data.formats.test_documents import DUMP


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    (tmp_path / "docs" / "a.md").write_text("# Rivers\nThe Loire is long. The Seine is not.\n")
    (tmp_path / "docs" / "deep" / "b.txt").write_text("The Rhine flows north.")
    (tmp_path / "docs" / "picture.png").write_bytes(b"\x89PNG")
    return tmp_path / "docs"


def test_a_folder_becomes_a_corpus(folder, tmp_path, capsys):
    out = tmp_path / "corpus.jsonl"
    assert sleuth.main(["corpus", str(folder), "--out", str(out), "--words", "5"]) == 0
    assert "3 passages from 2 files" in capsys.readouterr().out
    corpus = Corpus(out)
    assert [p.id for p in corpus] == ["a.md#0", "a.md#1", "deep/b.txt#0"]
    assert (corpus[0].title, corpus[0].text) == ("Rivers", "The Loire is long.")
    assert sleuth.main(["index", "--corpus", str(out), "--out", str(tmp_path / "index")]) == 0


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.json", "saved"])
def test_the_rows_of_a_table_are_passages_as_they_are(tmp_path, name):
    rows = [{"id": "1", "title": "Rome", "text": "A city. It is old.", "image": "x.png"}]
    source, out = tmp_path / "from" / name, tmp_path / "to" / "c.jsonl"
    source.parent.mkdir()
    if name == "a.csv":
        source.write_text(",".join(rows[0]) + "\n" + ",".join(rows[0].values()) + "\n")
    elif name == "a.json":
        source.write_text(json.dumps(rows))
    elif name == "saved":
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(source)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    assert sleuth.main(["corpus", str(source), "--out", str(out)]) == 0
    [line] = out.read_text().splitlines()
    assert json.loads(line) == rows[0] | {
        "image": "../from/saved/train/x.png" if name == "saved" else "../from/x.png"
    }


def test_a_table_without_rows_is_no_corpus(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("id,text\n")
    assert sleuth.main(["corpus", str(tmp_path / "a.csv"), "--out", str(tmp_path / "c.jsonl")]) == 2
    assert "a.csv: holds no passages" in capsys.readouterr().err
    assert not (tmp_path / "c.jsonl").exists()


def test_the_passages_of_a_corpus_are_cut_smaller_under_their_titles(folder, tmp_path, capsys):
    rows = [{"id": "7", "contents": '"Rivers"\nThe Loire is long. The Seine is not.'}]
    (folder / "whole.jsonl").write_text(json.dumps(rows[0]) + "\n")
    out = tmp_path / "c.jsonl"
    assert sleuth.main(["corpus", str(folder / "whole.jsonl"), "--out", str(out), "--words", "5"]) == 0
    found = [(p.id, p.title, p.text) for p in Corpus(out)]
    assert found == [("7#0", "Rivers", "The Loire is long."), ("7#1", "Rivers", "The Seine is not.")]
    assert sleuth.main(["corpus", str(folder), "--out", str(out)]) == 0  # in a folder it is passed over
    assert "from 2 files" in capsys.readouterr().out
    (folder / "whole.jsonl").write_text('{"id": "7"}\n')
    assert sleuth.main(["corpus", str(folder / "whole.jsonl"), "--out", str(out)]) == 2
    assert "whole.jsonl: cannot be read" in capsys.readouterr().err


def test_an_unreadable_file_stops_or_is_skipped(folder, tmp_path, capsys):
    (folder / "c.pdf").write_bytes(b"no pdf")
    out = tmp_path / "corpus.jsonl"
    assert sleuth.main(["corpus", str(folder), "--out", str(out)]) == 2
    assert "c.pdf: cannot be read" in (said := capsys.readouterr().err) and "--on_error skip" in said
    assert not out.exists()
    assert sleuth.main(["corpus", str(folder), "--out", str(out), "--on_error", "skip"]) == 0
    assert "2 passages from 3 files" in (said := capsys.readouterr().out) and "1 file skipped" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["absent"], "source = absent: no such file or folder"),
        (["{docs}", "--words", "5", "--overlap", "5"], "must be 0 <= overlap < words"),
        (["{docs}", "--on_error", "pass"], "on_error: got 'pass', expected one of 'stop', 'skip'"),
        (["{docs}/blank"], "blank: no text in 1 file"),
        (["{docs}/empty"], "holds no file that ends in .txt, .md"),
    ],
)
def test_wrong_options_are_refused(options, said, folder, tmp_path, capsys):
    (folder / "empty").mkdir()
    (folder / "blank").mkdir()
    (folder / "blank" / "a.txt").touch()
    argv = [option.format(docs=folder) for option in options]
    assert sleuth.main(["corpus", *argv, "--out", str(tmp_path / "c.jsonl")]) == 2
    assert said in capsys.readouterr().err


def test_a_packed_corpus_is_cut_too(tmp_path):
    rows = gzip.compress(b'{"id": "a", "contents": "One. Two."}\n')
    (tmp_path / "c.jsonl.gz").write_bytes(rows)
    assert sleuth.main(["corpus", str(tmp_path / "c.jsonl.gz"), "--out", str(tmp_path / "out.jsonl")]) == 0
    assert '"id": "a#0"' in (tmp_path / "out.jsonl").read_text()


def test_the_bar_follows_how_far_a_dump_is_read(tmp_path, capsys, monkeypatch):
    pytest.importorskip("mwxml")
    for name, pack in {"a.xml.bz2": bz2.compress, "b.xml.gz": gzip.compress, "c.xml": bytes}.items():
        (tmp_path / name).write_bytes(pack(DUMP.encode().replace(b"<id>7<", b"<id>7%d<" % ord(name[0]))))
    read, move = [], Bar.move
    monkeypatch.setattr(Bar, "move", lambda self, done, *of: (read.append(done), move(self, done, *of)))
    assert sleuth.main(["corpus", str(tmp_path), "--out", str(tmp_path / "c.jsonl")]) == 0
    assert "6 passages from 3 files" in capsys.readouterr().out
    size = sum((tmp_path / name).stat().st_size for name in ("a.xml.bz2", "b.xml.gz", "c.xml"))
    assert read == sorted(read) and read[-1] == size and len(set(read)) > 3  # more than once a file


def test_files_that_give_nothing_are_counted_with_the_reason(folder, tmp_path, capsys):
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text(" \n")
    (folder / "menu.html").write_text("<nav>only</nav>")
    (folder / "menu2.htm").write_text("<nav>only</nav>")
    assert sleuth.main(["corpus", str(folder), "--out", str(tmp_path / "c.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "2 passages from 6 files" in said and "4 files gave nothing: " in said
    for reason in (
        "1 blank (such as blank.txt)",
        "1 empty (such as empty.txt)",
        "2 no text beside navigation",
    ):
        assert reason in said
    for path in (*folder.glob("*.md"), *folder.glob("deep/*")):
        path.unlink()
    assert sleuth.main(["corpus", str(folder), "--out", str(tmp_path / "d.jsonl")]) == 2
    assert "no text in 4 files; 4 files gave nothing: " in capsys.readouterr().err
