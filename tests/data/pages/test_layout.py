"""Layout: rows are as wide as measured, what does not fit is made smaller, then cut and said."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from data.errors import DataError
from data.pages.layout import LAYOUTS, _font, draw_page, wrap

pytest.importorskip("PIL")

LONG = " ".join(f"word{i}" for i in range(400))


def ink(image, layout):
    """Rows and columns of the pixels that are not paper."""
    paper = np.array([int(layout.paper[i : i + 2], 16) for i in (1, 3, 5)])
    return np.argwhere(np.abs(np.asarray(image).astype(int) - paper).sum(-1) > 60)


@pytest.mark.parametrize("across", [40, 130, 400])
def test_no_row_is_wider_than_the_column_and_no_word_is_lost(across):
    text = f"A river flows.\n{'x' * 90} to the sea, said\n\nthe {'漢' * 30}"
    rows = wrap(text, across, "", 20)
    assert max(_font("", 20).getlength(row) for row in rows) <= across
    assert "".join("".join(rows).split()) == "".join(text.split())


def test_rows_are_filled_greedily():
    rows = wrap(LONG, 300, "", 20)
    for row, after in pairwise(rows):
        assert _font("", 20).getlength(f"{row} {after.split()[0]}") > 300


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("size", [(800, 1000), (224, 112), (64, 64)])
def test_every_layout_draws_within_its_margins(name, size):
    layout = LAYOUTS[name]
    image, _ = draw_page("A title of some length", "And a text below it.", layout, *size)
    assert (image.size, image.mode) == (size, "RGB")
    marked = ink(image, layout)
    assert len(marked) > 50
    assert marked.max(0)[0] < size[1] - 1
    assert layout.band or marked.min() > 0  # a band goes to the edges


def test_a_text_that_is_long_is_drawn_smaller_before_it_is_cut():
    layout = LAYOUTS["page"]
    _, short = draw_page("T", LONG[:500], layout, 400, 400)
    _, smaller = draw_page("T", LONG[:1500], layout, 400, 400)
    _, cut = draw_page("T", LONG * 3, layout, 400, 400)
    assert (short, smaller) == ("", "")
    assert cut == "does not fit on the page and is cut"


def test_two_columns_stand_side_by_side():
    layout = LAYOUTS["columns"]
    marked = ink(draw_page("", LONG[:600], layout, 400, 400)[0], layout)
    left, right = marked[marked[:, 1] < 190], marked[marked[:, 1] > 210]
    assert len(left) > 500 and len(right) > 500
    assert not ((marked[:, 1] > 193) & (marked[:, 1] < 207)).any()  # the gap


def test_the_same_page_gives_the_same_pixels():
    pages = [np.asarray(draw_page("T", LONG, LAYOUTS["card"], 300, 300)[0]) for _ in range(2)]
    np.testing.assert_array_equal(*pages)


def test_letters_that_the_font_lacks_are_named():
    layout = LAYOUTS["page"]
    assert (
        draw_page("Besançon – Gießen", "“naïve” Łø…", layout, 300, 300)[1] == "the font has no letter for Ł"
    )
    assert draw_page("", "漢字", layout, 300, 300)[1] == "the font has no letter for 字 漢"


def test_a_font_that_is_none_is_refused_by_name(tmp_path):
    (tmp_path / "a.ttf").write_bytes(b"no font")
    for name in ("a.ttf", "none.ttf"):
        with pytest.raises(DataError, match=f"{name}: no font that can be read"):
            draw_page("T", "", LAYOUTS["page"], 100, 100, font=str(tmp_path / name))
