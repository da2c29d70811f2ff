"""Rendering: the same bytes whoever draws, what is there is not drawn again, what is broken is named."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from data.corpus import Corpus
from data.errors import ConfigError, DataError, RunStopped
from data.pages import rendering
from data.pages.images import png, read_image
from data.pages.rendering import Style, draw, render
from data.records import Passage

Image = pytest.importorskip("PIL.Image")

SMALL = Style(width=160, height=120, font_size=12)
PASSAGES = [Passage(f"p/{i}", f"It is number {i}.", f"Page {i}", {"n": i}) for i in range(12)]


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_passages_become_pictures_and_a_corpus_that_names_them(tmp_path):
    done = render(PASSAGES, tmp_path, SMALL)
    assert (done.count, done.skipped) == (12, 0)
    for before, after in zip(PASSAGES, Corpus(done.corpus), strict=True):
        assert (after.id, after.title, after.text, after.metadata) == (
            before.id, before.title, before.text, before.metadata,
        )  # fmt: skip
        np.testing.assert_array_equal(read_image(after.image), draw(before, SMALL)[0])


def test_one_process_and_several_write_the_same_bytes(tmp_path):
    style = Style(("page", "columns", "card"), width=160, height=120)
    render(PASSAGES, tmp_path / "one", style)
    render(PASSAGES, tmp_path / "two", style, processes=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_the_layout_of_a_passage_is_its_own_whatever_stands_beside_it(tmp_path):
    style = Style(("page", "night"), width=160, height=120)
    papers = [draw(p, style)[0].getpixel((0, 0)) for p in PASSAGES]
    assert len(set(papers)) == 2
    assert [draw(p, style)[0].getpixel((0, 0)) for p in reversed(PASSAGES)] == papers[::-1]


@pytest.mark.parametrize("shows", ["title", "text"])
def test_a_page_shows_only_what_is_asked_for(shows):
    style = Style(width=160, height=120, shows=shows)
    page = draw(Passage("a", "text", "title"), style)[0]
    other = Passage("a", "text", "other") if shows == "text" else Passage("a", "other", "title")
    assert png(page) == png(draw(other, style)[0])
    with pytest.raises(DataError, match="nothing to draw"):
        draw(Passage("a", "") if shows == "text" else Passage("a", "text"), style)


def test_a_run_that_was_stopped_goes_on_and_ends_as_one_that_was_not(tmp_path, monkeypatch):
    render(PASSAGES, tmp_path / "whole", SMALL)

    def stopping(items, total):
        for number, item in enumerate(items):
            if number == 5:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        render(PASSAGES, tmp_path / "cut", SMALL, progress=stopping)
    assert not (tmp_path / "cut" / "corpus.jsonl").exists()
    there = sorted((tmp_path / "cut").rglob("*.png"))
    there[0].write_bytes(b"")  # as a power cut leaves it
    drawn = []
    monkeypatch.setattr(rendering, "draw", lambda p, style: drawn.append(p.id) or draw(p, style))
    render(PASSAGES, tmp_path / "cut", SMALL)
    assert len(drawn) == len(PASSAGES) - len(there) + 1
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_changed_passage_or_style_is_drawn_again(tmp_path):
    render(PASSAGES[:2], tmp_path, SMALL)
    before = [p.image for p in Corpus(tmp_path / "corpus.jsonl")]
    render([PASSAGES[0], Passage("p/1", "It changed.", "Page 1")], tmp_path, SMALL)
    after = [p.image for p in Corpus(tmp_path / "corpus.jsonl")]
    assert after[0] == before[0] and after[1] != before[1]
    render(PASSAGES[:2], tmp_path, Style(width=160, height=121, font_size=12))
    assert not {p.image for p in Corpus(tmp_path / "corpus.jsonl")} & {*before, *after}


def test_pictures_are_shrunk_and_follow_the_bytes_of_their_file(tmp_path):
    path = tmp_path / "a.png"
    names = []
    for colour in ("red", "blue"):
        Image.new("RGB", (400, 200), colour).save(path)
        os.utime(path, ns=(1, 1 if colour == "red" else 2))
        done = render([Passage("a", "", image=str(path))], tmp_path / "out", Style(max_side=100))
        names.append(Corpus(done.corpus)[0].image)
    assert names[0] != names[1]
    assert read_image(names[1]).size == (100, 50)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_broken_picture_stops_or_is_skipped_by_name(tmp_path, processes, caplog):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    passages = [*PASSAGES[:3], Passage("bad one", "", image=str(tmp_path / "bad.png"))]
    with pytest.raises(DataError, match=r"passage 'bad one': .*bad.png: .*--on_error skip"):
        render(passages, tmp_path / "out", SMALL, processes)
    with caplog.at_level(logging.WARNING):
        done = render(passages, tmp_path / "out", SMALL, processes, "skip")
    assert (done.count, done.skipped) == (3, 1) and "bad.png" in caplog.text
    assert [p.id for p in Corpus(done.corpus)] == ["p/0", "p/1", "p/2"]
    with pytest.raises(DataError, match="no passage could be rendered"):
        render(passages[3:], tmp_path / "none", SMALL, 1, "skip")


def test_what_is_cut_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        render([Passage("long", "word " * 3000), Passage("long too", "word " * 3000)], tmp_path, SMALL)
    assert "passage 'long': does not fit on the page" in caplog.text and "2 pages" in caplog.text


def test_a_killed_drawing_process_is_said_and_leaves_none_behind(tmp_path):
    def killing(items, total):
        for number, item in enumerate(items):
            if number == 2:
                os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
            yield item

    many = [Passage(f"p{i}", f"Number {i}.") for i in range(600)]
    with pytest.raises(RunStopped, match=r"killed .* the same command goes on"):
        render(many, tmp_path, SMALL, processes=2, progress=killing)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layouts": ("page", "poster")}, "layouts = 'poster': must be one of page, columns"),
        ({"layouts": ()}, r"layouts = \(\)"),
        ({"width": 0}, "width = 0: must be 32 to 8192"),
        ({"max_side": 3}, "max_side = 3"),
    ],
)
def test_a_wrong_style_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Style(**wrong)


def test_a_font_that_cannot_be_read_is_refused_before_anything_is_drawn():
    with pytest.raises(DataError, match=r"none\.ttf: no font"):
        Style(fonts=("none.ttf",))
