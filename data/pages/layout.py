"""A title and a text drawn as a page: lines wrapped by their measured width, in one of several layouts.

    draw_page("Rome", "A city on the Tiber.", LAYOUTS["page"], width=800, height=1000)

Pillow draws (the extra `images`), with a font given or the one that it ships. That one knows English
letters: accents are taken off and dashes made plain for it, and other scripts need a font.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from data.errors import DataError
from data.pages.images import needs_images

if TYPE_CHECKING:
    from PIL.Image import Image

_SMALLEST = 8  # pixels; a text is drawn smaller until it fits, to half of its size but not below this


_NO_LETTER = "\uffff"
_PLAIN = {**dict.fromkeys(map(ord, "‐‑‒–—―−"), "-"), ord("ß"): "ss", ord("ø"): "o"}


@dataclass(frozen=True)
class Layout:
    """Look of a page. Colours as Pillow reads them.

    title_scale: size of the title by that of the text. band: colour behind the title, whose letters are
    then those of the paper. rule: a line under the title. middle: all in the middle of the height.
    """

    columns: int = 1
    centred: bool = False
    middle: bool = False
    title_scale: float = 1.6
    paper: str = "#ffffff"
    ink: str = "#111111"
    band: str = ""
    rule: bool = False


LAYOUTS = {
    "page": Layout(rule=True),
    "columns": Layout(columns=2, title_scale=1.8, rule=True),
    "slide": Layout(band="#1f3a5f", title_scale=2.0, paper="#f7f7f2"),
    "card": Layout(centred=True, middle=True, title_scale=2.0, paper="#fdf6e3", ink="#2b2b2b"),
    "note": Layout(title_scale=1.2, paper="#fff9c4", ink="#1a237e"),
    "night": Layout(paper="#16181d", ink="#e6e6e6"),
}
"""Layouts by name."""


@dataclass(frozen=True)
class _Line:
    x: float
    y: float
    text: str
    font_size: int
    colour: str


def draw_page(
    title: str, text: str, layout: Layout, width: int, height: int, font_size: int = 20, font: str = ""
) -> tuple[Image, str]:
    """The page (RGB, width x height) and what is wrong with it: "", that it is cut, that letters are missing.

    font: a font file; "" is Pillow's own. What does not fit is drawn smaller, down to half of `font_size`;
    what then still does not ends in "…". Raises DataError for a font that cannot be read.
    """
    with needs_images("layout"):
        from PIL import Image, ImageDraw

    title, text = _for_font(title, font), _for_font(text, font)
    size, smallest = font_size, max(_SMALLEST, font_size // 2)
    while True:
        page = _Page(layout, width, height, size, font)
        fits = page.place(title, text)
        if fits or size <= smallest:
            break
        size = max(smallest, size - max(1, size // 8))
    image = Image.new("RGB", (width, height), layout.paper)
    draw = ImageDraw.Draw(image)
    for box, colour in page.boxes:
        draw.rectangle(box, fill=colour)
    for line in page.lines:
        draw.text((line.x, line.y), line.text, fill=line.colour, font=_font(font, line.font_size))
    lacking = sorted(letter for letter in {*title, *text} if _lacks(font, letter))
    said = f"the font has no letter for {' '.join(lacking[:5])}" if lacking else ""
    return image, said or ("" if fits else "does not fit on the page and is cut")


class _Page:
    """Places of the title, lines and boxes of a page, at one size of letters."""

    def __init__(self, layout: Layout, width: int, height: int, size: int, font: str) -> None:
        self.layout, self.width, self.height, self.size, self.font = layout, width, height, size, font
        self.margin = min(size * 1.5, width / 10, height / 10)
        self.lines: list[_Line] = []
        self.boxes: list[tuple[tuple[float, float, float, float], str]] = []

    def place(self, title: str, text: str) -> bool:
        """Fill `lines` and `boxes`; whether nothing had to be left out."""
        fits, top = self._title(title)
        columns = self.layout.columns
        gap = self.margin
        column = (self.width - 2 * self.margin - gap * (columns - 1)) / columns
        rows = wrap(text, column, self.font, self.size)
        step = self.size * 1.35
        room = max(0, int((self.height - self.margin - top) // step))
        fits &= self._cut(rows, room * columns, column, self.size)
        if self.layout.columns > 1 and len(rows) < room * columns:
            room = -(-len(rows) // columns)  # columns of one height
        for number, row in enumerate(rows):
            left = self.margin + (number // room) * (column + gap)
            self._line(left, top + (number % room) * step, row, column, self.size, self.layout.ink)
        if self.layout.middle and self.lines:
            down = max(0.0, (self.height - self.margin - min(len(rows), room) * step - top) / 2)
            self.lines = [replace(line, y=line.y + down) for line in self.lines]
        return fits

    def _title(self, title: str) -> tuple[bool, float]:
        """Place the title; return whether it fits, and where the text under it starts."""
        if not title:
            return True, self.margin
        size, across = round(self.size * self.layout.title_scale), self.width - 2 * self.margin
        rows, step, top = wrap(title, across, self.font, size), size * 1.25, self.margin
        fits = self._cut(rows, max(1, int((self.height - 2 * top) // step)), across, size)
        under = top + len(rows) * step
        if self.layout.band:
            self.boxes.append(((0, 0, self.width, under + self.margin / 2), self.layout.band))
        if self.layout.rule:
            self.boxes.append(((top, under + 2, self.width - top, under + 3), self.layout.ink))
        colour = self.layout.paper if self.layout.band else self.layout.ink
        for number, row in enumerate(rows):
            self._line(top, top + number * step, row, across, size, colour)
        return fits, under + self.size * (1.0 if self.layout.band else 0.6)

    def _line(self, left: float, y: float, row: str, across: float, size: int, colour: str) -> None:
        shift = (across - _width(self.font, size, row)) / 2 if self.layout.centred else 0
        self.lines.append(_Line(left + shift, y, row, size, colour))

    def _cut(self, rows: list[str], room: int, across: float, size: int) -> bool:
        """Take off the rows that have no room, so that the last one says so; whether all had."""
        if len(rows) <= room:
            return True
        del rows[room:]
        if rows:
            last = rows[-1]
            while last and _width(self.font, size, f"{last}…") > across:
                last = last[:-1]
            rows[-1] = f"{last}…"
        return False


def wrap(text: str, across: float, font: str, size: int) -> list[str]:
    """The text in rows no wider than `across` pixels; a word that is wider is broken between letters."""
    rows: list[str] = []
    space = _width(font, size, " ")
    for paragraph in text.splitlines():
        row, used = "", 0.0
        for word in _pieces(paragraph, across, font, size):
            width = _width(font, size, word)
            if row and used + space + width > across:
                rows.append(row)
                row, used = word, width
            else:
                row, used = (f"{row} {word}", used + space + width) if row else (word, width)
        if row:
            rows.append(row)
    return rows


def _pieces(paragraph: str, across: float, font: str, size: int) -> Iterator[str]:
    for word in paragraph.split():
        while len(word) > 1 and _width(font, size, word) > across:
            fit, over = 1, len(word)  # letters that fit, letters that do not
            while over - fit > 1:
                half = (fit + over) // 2
                fit, over = (half, over) if _width(font, size, word[:half]) <= across else (fit, half)
            yield word[:fit]
            word = word[fit:]
        yield word


@lru_cache(maxsize=200_000)
def _width(font: str, size: int, word: str) -> float:
    """Pixels; words come again, so most are measured once."""
    return _font(font, size).getlength(word)


def _for_font(text: str, font: str) -> str:
    """The text with what Pillow's own font lacks and has near: plain dashes, letters without accents."""
    if font or text.isascii():
        return text
    folded = unicodedata.normalize("NFKD", text.translate(_PLAIN))
    return "".join(letter for letter in folded if not unicodedata.combining(letter))


@lru_cache(maxsize=20_000)
def _lacks(font: str, letter: str) -> bool:
    """Return whether the font draws for the letter what it draws for one that does not exist."""
    if not letter.isprintable() or letter.isspace():
        return False
    drawn = _font(font, 32)
    return bytes(drawn.getmask(letter)) == bytes(drawn.getmask(_NO_LETTER))


@lru_cache(maxsize=256)
def _font(path: str, size: int) -> Any:
    from PIL import ImageFont

    if not path:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no font that can be read ({error})") from error
