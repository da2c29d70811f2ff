"""`sleuth render` as a command: corpora, PDFs, HTML and images become pictures and a corpus."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from data.corpus import Corpus
from data.errors import ConfigError, DataError
from data.pages.images import read_image
from data.pages.page_sources import find_chromium, find_pages, print_html
from scripts import __main__ as sleuth
from tests.pdfs import write_pdf

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def folder(tmp_path):
    docs = tmp_path / "docs"
    (docs / "deep").mkdir(parents=True)
    write_pdf(
        docs / "deep" / "rivers.pdf", ["The Loire is long.\nThe Seine is not.", "The Rhine flows north."]
    )
    Image.new("RGB", (80, 60), "teal").save(docs / "boat.PNG")
    (docs / "notes.txt").write_text("passed over")
    return docs


def test_a_folder_of_pdfs_and_images_becomes_pages(folder, tmp_path, capsys):
    out = tmp_path / "pages"
    assert sleuth.main(["render", str(folder), "--out", str(out), "--processes", "1"]) == 0
    assert f"3 pages in {out}/corpus.jsonl" in capsys.readouterr().out
    boat, *pages = Corpus(out / "corpus.jsonl")
    assert (boat.id, boat.title, boat.text) == ("boat.PNG", "boat", "")
    assert [p.id for p in pages] == ["deep/rivers.pdf#page=1", "deep/rivers.pdf#page=2"]
    assert pages[0].text == "The Loire is long.\nThe Seine is not." and pages[0].title == "rivers"
    assert pages[1].metadata == {"source": "deep/rivers.pdf", "page": 2}
    assert read_image(boat.image).size == (80, 60)
    drawn = np.asarray(read_image(pages[1].image))
    assert drawn.shape == (400, 600, 3) and (drawn < 100).any()  # 144 dots an inch, and something is written
    np.testing.assert_array_equal(drawn, read_image(f"{folder}/deep/rivers.pdf#page=2"))


def test_the_title_is_what_the_pdf_says(tmp_path):
    write_pdf(tmp_path / "a.pdf", ["x"], title="On Rivers")
    pages, skipped = find_pages(tmp_path / "a.pdf", tmp_path)
    assert (pages[0].title, skipped) == ("On Rivers", 0)


def test_a_corpus_is_drawn_and_its_options_count(tmp_path):
    lines = [{"id": str(i), "title": f"T{i}", "text": "some text"} for i in range(3)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--layouts", "card,night", "--width", "224", "--height", "112", "--shows", "title"]
    argv = ["render", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "o"), "--processes", "1", *options]
    assert sleuth.main(argv) == 0
    corpus = Corpus(tmp_path / "o" / "corpus.jsonl")
    assert [(p.id, p.text) for p in corpus] == [(str(i), "some text") for i in range(3)]
    assert {read_image(p.image).size for p in corpus} == {(224, 112)}


def test_a_truncated_pdf_stops_or_is_skipped_by_name(folder, tmp_path, capsys):
    whole = (folder / "deep" / "rivers.pdf").read_bytes()
    (folder / "cut.pdf").write_bytes(whole[:150])
    argv = ["render", str(folder), "--out", str(tmp_path / "o"), "--processes", "1"]
    assert sleuth.main(argv) == 2
    assert "cut.pdf: a broken PDF" in (said := capsys.readouterr().err) and "--on_error skip" in said
    assert sleuth.main([*argv, "--on_error", "skip"]) == 0
    assert "3 pages" in (said := capsys.readouterr().out) and "skipped 1 file and 0 pages" in said


def test_one_broken_page_is_skipped_and_the_others_of_its_pdf_stay(tmp_path, capsys):
    path = write_pdf(tmp_path / "a.pdf", ["one", "two", "three"])
    path.write_bytes(path.read_bytes().replace(b"8 0 obj\n<<", b"8 0 obj\n  "))  # page 2
    argv = ["render", str(path), "--out", str(tmp_path / "o"), "--processes", "1"]
    assert sleuth.main(argv) == 2
    assert "a.pdf#page=2: a broken page" in capsys.readouterr().err
    assert sleuth.main([*argv, "--on_error", "skip"]) == 0
    assert [p.text for p in Corpus(tmp_path / "o" / "corpus.jsonl")] == ["one", "three"]


def test_pages_drawn_into_their_own_source_are_none_of_it(folder):
    for _ in range(2):
        assert sleuth.main(["render", str(folder), "--out", str(folder / "pages"), "--processes", "1"]) == 0
        assert len(Corpus(folder / "pages" / "corpus.jsonl")) == 3


def test_html_is_printed_again_where_its_folder_or_what_it_shows_differs(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "my page.html").write_text("<img src='my chart.png'>")
        (tmp_path / name / "my chart.png").write_text(name)
    shown = lambda path, _: (path.parent / "my chart.png").read_bytes()  # noqa: E731
    monkeypatch.setattr("data.pages.page_sources._printed", shown)

    def printed(name):
        return print_html(tmp_path / name / "my page.html", tmp_path / "pdfs")

    assert [printed(name).read_text() for name in "abab"] == ["a", "b", "a", "b"]
    assert printed("a") == printed("a")
    (tmp_path / "a" / "my chart.png").write_text("another")
    assert printed("a").read_text() == "another"


def test_the_package_that_reads_pdfs_is_missed_before_chromium_prints(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    monkeypatch.setattr("data.pages.page_sources.find_chromium", lambda: pytest.fail("asked to print"))
    (tmp_path / "a.html").write_text("<p>A page.</p>")
    with pytest.raises(ConfigError, match=r"a\.html: needs the package pypdfium2"):
        find_pages(tmp_path / "a.html", tmp_path / "pdfs")


def test_html_that_chromium_does_not_print_is_named_with_the_seconds(tmp_path, monkeypatch):
    (browser := tmp_path / "chromium").write_text("#!/bin/sh\nexec sleep 60\n")
    browser.chmod(0o755)
    monkeypatch.setattr("data.pages.page_sources.find_chromium", lambda: str(browser))
    monkeypatch.setattr("data.pages.page_sources._PRINT_SECONDS", 0.1)
    (tmp_path / "a.html").write_text("<script>alert(1)</script>")
    with pytest.raises(DataError, match=r"a\.html: Chromium has not printed it in 0\.1 s; .* an alert"):
        print_html(tmp_path / "a.html", tmp_path / "pdfs")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["absent"], "source = absent: no such file or folder"),
        (["{docs}/notes.txt"], "notes.txt: must end in .jsonl, .pdf, .html"),
        (["{docs}/empty"], "empty: holds no file that ends in .pdf"),
        (["{docs}", "--layouts", "poster"], "layouts = 'poster': must be one of page"),
        (["{docs}", "--fonts", "{docs}/notes.txt"], "notes.txt: no font that can be read"),
        (["{docs}", "--processes", "-1"], "processes = -1: must be 1 or more"),
    ],
)
def test_wrong_options_are_refused(options, said, folder, tmp_path, capsys):
    (folder / "empty").mkdir()
    argv = [option.format(docs=folder) for option in options]
    assert sleuth.main(["render", *argv, "--out", str(tmp_path / "o")]) == 2
    assert said in capsys.readouterr().err


def test_a_corpus_is_not_drawn_onto_itself(tmp_path, capsys):
    (tmp_path / "corpus.jsonl").write_text('{"id": "1", "text": "a"}\n')
    assert sleuth.main(["render", str(tmp_path / "corpus.jsonl"), "--out", str(tmp_path)]) == 2
    assert "give another folder" in capsys.readouterr().err


HTML = """<!doctype html><html><head><title>Rivers</title><style>h1 {color: red}</style></head>
<body><h1>The Loire</h1><p>It is long.</p><img src="http://127.0.0.1:1/x.png">
<p style="page-break-before: always">The Seine</p></body></html>"""


@pytest.mark.slow
@pytest.mark.skipif(find_chromium() is None, reason="no Chromium")
def test_html_is_drawn_page_by_page_and_always_alike(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.html").write_text(HTML)
    names = []
    for out in (tmp_path / "one", tmp_path / "two"):
        argv = ["render", str(tmp_path / "docs"), "--out", str(out), "--processes", "1"]
        assert sleuth.main(argv) == 0, capsys.readouterr().err
        names.append([os.path.relpath(p.image, out) for p in Corpus(out / "corpus.jsonl")])
    first, second = Corpus(tmp_path / "two" / "corpus.jsonl")
    assert (first.id, first.title, first.text) == ("a.html#page=1", "Rivers", "The Loire\nIt is long.")
    assert second.text == "The Seine"
    red = np.asarray(read_image(first.image)).astype(int)
    assert ((red[..., 0] > 200) & (red[..., 1] < 60)).any()
    assert names[0] == names[1]


def test_html_without_a_browser_says_what_is_missing(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.html").write_text(HTML)
    monkeypatch.setattr("data.pages.page_sources.find_chromium", lambda: None)
    assert sleuth.main(["render", str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    assert "a.html: needs Chromium" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_leaves_no_process_and_goes_on(tmp_path):
    lines = [{"id": str(i), "title": f"T{i}", "text": "some text " * 50} for i in range(200)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "scripts", "render", str(tmp_path / "c.jsonl"), "--processes", "2"]
    command += ["--width", "300", "--height", "300"]
    run = subprocess.Popen([*command, "--out", str(tmp_path / "cut")])
    while len(list(tmp_path.glob("cut/pages/*/*.png"))) < 20:
        assert run.poll() is None
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    time.sleep(2)
    there = set(tmp_path.glob("cut/pages/*/*.png"))
    time.sleep(1)
    assert set(tmp_path.glob("cut/pages/*/*.png")) == there  # nobody draws on
    assert 20 <= len(there) < 200
    times = {path: path.stat().st_mtime_ns for path in there}
    subprocess.run([*command, "--out", str(tmp_path / "cut")], check=True, capture_output=True)
    assert all(path.stat().st_mtime_ns == then for path, then in times.items())
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    cut, whole = ((tmp_path / name / "corpus.jsonl").read_bytes() for name in ("cut", "whole"))
    assert cut == whole
