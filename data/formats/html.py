"""The text of HTML pages between their headings, in any encoding that browsers know."""

from __future__ import annotations

import codecs
import re
from collections import Counter
from html.parser import HTMLParser
from typing import Any

_LABEL = re.compile(rb"""(?:charset|<\?xml[^>]{1,100}encoding)\s*=\s*["']?\s*([\w:.+-]+)""", re.IGNORECASE)
# Where Python's codec of a name lacks characters that browsers have under this name.
_CODECS = {
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc-jp": "euc_jisx0213",
    "euc-kr": "cp949",
    "big5": "big5hkscs",
}
_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}

_CODE = {"script", "style"}
_LEFT_OUT = _CODE | {"noscript", "template", "svg", "nav", "header", "footer", "aside"}
_LEFT_OUT |= {"button", "select", "textarea", "datalist"}
_TITLES = {"title", "h1", "h2", "h3", "h4", "h5", "h6"}
_INLINE = re.compile(
    "a|abbr|b|bdi|cite|code|dfn|em|i|img|kbd|mark|q|s|small|span|strong|sub|sup|time|u|var|wbr"
)
_NO_END = re.compile(
    f"{_INLINE.pattern}|p|li|dt|dd|tr|td|th|option|area|base|br|col|embed|hr|input|link|meta|source|track"
)


def decode_html(raw: bytes) -> str:
    """The characters of a page: by its byte order mark, else by the label it declares, else UTF-8 or Latin.

    Labels mean what the WHATWG's table says: gb2312 is GBK, iso-8859-1 is windows-1252.
    """
    for mark, encoding in _MARKS.items():
        if raw.startswith(mark):
            return raw[len(mark) :].decode(encoding, "replace")
    from webencodings import lookup

    declared = _LABEL.search(raw[:2048])
    found = lookup(declared[1].decode("ascii", "replace")) if declared else None
    if found is not None and not found.name.startswith("utf-"):  # a label that can be read is not UTF-16
        if found.name in _CODECS:
            return raw.decode(_CODECS[found.name], "replace")
        return found.codec_info.decode(raw, "replace")[0]
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("windows-1252", "replace")


def html_sections(html: str, name: str) -> list[tuple[str, str]]:
    """The title and text of each section: "page: heading"; navigation, scripts and controls are left out.

    name: the page's title where it has none. What should be left out and never ends is text like the rest:
    a `<nav>` that is not closed does not take the page with it.
    """
    html = re.sub(r"<!\[[^>]*>?", " ", html)  # <![if ...]> and such, which the parser cannot bear
    nesting = _Nesting()
    nesting.feed(html)
    nesting.close()
    sections = _Sections(name, nesting.ended)
    sections.feed(html)
    sections.close()
    sections.flush()
    return sections.found


class _Nesting(HTMLParser):
    """The open elements, numbered as they begin, and those that ended by their own end tag."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.ended: set[int] = set()
        self.number = 0
        self.open: list[tuple[str, int]] = []
        self.names: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.number += 1
        if not _NO_END.fullmatch(tag):
            self.open.append((tag, self.number))
            self.names[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        while self.names[tag]:  # what lies in it ends with it
            name, number = self.open.pop()
            self.names[name] -= 1
            if name == tag:
                self.ended.add(number)
                return


class _Sections(_Nesting):
    """The sections of a page; `whole`: the elements that end by their own end tag."""

    def __init__(self, name: str, whole: set[int]) -> None:
        super().__init__()
        self.page, self.named, self.heading = name, False, ""
        self.whole = whole
        self.left_out = self.inside = 0  # the number of the element, 0: in none
        self.words: list[str] = []
        self.titled: list[str] = []
        self.found: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        super().handle_starttag(tag, attrs)
        ends = tag in _CODE or self.number in self.whole
        if tag in _TITLES and ends and not self.inside and self._has_title(tag):
            if not self.left_out:
                self.flush()
            self.inside, self.titled = self.number, []
        elif tag in _LEFT_OUT and ends and not self.left_out:
            self._add(" ")
            self.left_out = self.number
        elif not _INLINE.fullmatch(tag):
            self._add("\n")

    def handle_endtag(self, tag: str) -> None:
        super().handle_endtag(tag)
        last = self.open[-1][1] if self.open else 0
        if self.inside > last:
            self._end_title(tag)
        elif not _INLINE.fullmatch(tag):
            self._add("\n")
        if self.left_out > last:
            self.left_out = 0

    def handle_data(self, data: str) -> None:
        self._add(data.replace("\n", " "))

    def flush(self) -> None:
        text = "\n".join(" ".join(line.split()) for line in "".join(self.words).split("\n"))
        if text.strip():
            self.found.append((f"{self.page}: {self.heading}" if self.heading else self.page, text))
        self.words = []

    def _add(self, text: str) -> None:
        if self.inside and not self.left_out > self.inside:
            self.titled.append(text)
        elif not self.left_out:
            self.words.append(text)

    def _has_title(self, tag: str) -> bool:
        """Return whether a heading counts: in a header as the name of the page alone, in a drawing never."""
        if self.names["svg"]:
            return False
        return not self.left_out or tag in ("title", "h1")

    def _end_title(self, tag: str) -> None:
        self.inside = 0
        title = " ".join("".join(self.titled).split())
        if tag in ("title", "h1") and not self.named and title:
            self.page, self.named, self.heading = title, True, ""
        elif tag != "title":
            self.heading = "" if title == self.page else title
