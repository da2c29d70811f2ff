"""Pages as PNG files beside a corpus that names them: from passages, PDF and HTML files, a folder of images.

    out/corpus.jsonl            {"id", "title", "text", "metadata", "image": "pages/1f/NAME-HASH.png"}
    out/pages/1f/NAME-HASH.png

The name of a picture holds the hash of all that it is drawn from, so one that is there need not be drawn
again: a run that was killed goes on, and a page that changed gets another name.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any, Literal

from data.atomic import atomic_write
from data.corpus import Corpus, hash_text
from data.errors import DataError, require, unreadable
from data.formats.rows import passage_row
from data.jsonl import write_jsonl
from data.machine.processes import in_processes
from data.pages.images import PAGE_DPI, png, read_image, split_page
from data.pages.layout import LAYOUTS, draw_page
from data.records import Passage

logger = logging.getLogger(__name__)

OnError = Literal["stop", "skip"]
Progress = Callable[[Iterable[Any], int], Iterable[Any]]

_Outcomes = Generator[tuple[int, str, str], None, None]  # position, what is broken, a complaint

_DRAWING = 1  # raised when the same passage is drawn otherwise
_PNG_END = b"IEND\xaeB`\x82"


@dataclass(frozen=True)
class Style:
    """Look of passages that are drawn, and the largest size of pictures that are there."""

    layouts: tuple[str, ...] = ("page",)
    """Names in `data.pages.layout.LAYOUTS`; of several each passage has one, by its id."""
    fonts: tuple[str, ...] = ()
    """Font files; of several each passage has one, by its id; without any, Pillow's own."""
    width: int = 800
    height: int = 1000
    font_size: int = 20
    """Pixels of the text; it is drawn smaller where it would not fit."""
    shows: Literal["both", "title", "text"] = "both"
    """Parts of a passage that are drawn."""
    max_side: int = 0
    """Pictures and pages of PDFs are shrunk until no side is longer; 0 leaves them as they are."""

    def __post_init__(self) -> None:
        for name in self.layouts:
            require(name in LAYOUTS, "layouts", name, f"one of {', '.join(LAYOUTS)}")
        require(len(self.layouts) > 0, "layouts", self.layouts, f"some of {', '.join(LAYOUTS)}")
        for name, least in (("width", 32), ("height", 32), ("font_size", 6)):
            require(least <= getattr(self, name) <= 8192, name, getattr(self, name), f"{least} to 8192")
        require(self.max_side == 0 or self.max_side >= 16, "max_side", self.max_side, "0, or 16 and more")
        for font in self.fonts:
            draw_page("a", "", LAYOUTS["page"], 32, 32, font=font)  # DataError where it is none


@dataclass(frozen=True)
class Rendered:
    """Result of a rendering: the corpus, its passages, and how many of them were left out as broken."""

    corpus: Path
    count: int
    skipped: int


def render(
    passages: Corpus | Sequence[Passage],
    out: str | Path,
    style: Style | None = None,
    processes: int = 1,
    on_error: OnError = "stop",
    progress: Progress | None = None,
) -> Rendered:
    """Write a PNG of every passage under `out`/pages, and `out`/corpus.jsonl with their names.

    A passage with an image has that one, decoded, shrunk to `style.max_side` and written again; others are
    drawn from title and text. The same passages and style give the same bytes, in any number of processes.
    Raises DataError naming a broken one, or leaves it out with on_error="skip"; no passage left is a
    DataError too. `passages` goes to the other processes by pickle: a `Corpus` maps its file there.
    """
    style, out = style or Style(), Path(out)
    require(processes >= 1, "processes", processes, "1 or more")
    shares = min(processes, max(1, len(passages)))
    job = _Job(passages, out, style)
    done = in_processes(job, shares, "drawing")
    broken: set[int] = set()
    complaints: Counter[str] = Counter()
    with closing(done):  # ends the processes, whatever ends the loop
        for position, error, complaint in progress(done, len(passages)) if progress else done:
            what = f"passage {passages[position].id!r}: {error or complaint}"
            if error and on_error == "stop":
                raise DataError(f"{what} (--on_error skip leaves it out)")
            if error:
                logger.warning("skipped: %s", what)
                broken.add(position)
            kind = complaint.partition(" for ")[0]
            if kind and not complaints[kind]:
                logger.warning("%s (the first; others are only counted)", what)
            complaints[kind] += 1
    if len(broken) == len(passages):
        raise DataError(f"{out}: no passage could be rendered")
    if said := complaints.total() - complaints[""]:
        logger.warning("%d pages are cut or lack letters", said)
    write_jsonl(out / "corpus.jsonl", job.rows(broken))
    return Rendered(out / "corpus.jsonl", len(passages) - len(broken), len(broken))


def draw(passage: Passage, style: Style) -> tuple[Any, str]:
    """The picture of a passage (PIL, RGB), and a complaint about it or ""; DataError where it is broken."""
    if passage.image:
        image = read_image(passage.image)
        if style.max_side:
            image.thumbnail((style.max_side, style.max_side))
        return image, ""
    title = passage.title if style.shows != "text" else ""
    text = passage.text if style.shows != "title" else ""
    if not title and not text:
        raise DataError(
            "nothing to draw: no image, and no text" if style.shows == "both" else "nothing to draw"
        )
    layout, font = _choice(passage.id, style)
    return draw_page(title, text, LAYOUTS[layout], style.width, style.height, style.font_size, font)


@dataclass(frozen=True)
class _Job:
    """Passages to draw, where to, and how; goes to other processes."""

    passages: Corpus | Sequence[Passage]
    out: Path
    style: Style

    def share(self, first: int, step: int) -> _Outcomes:
        """Draw every `step`-th page; yields its position, what is broken about it, a complaint."""
        for position in range(first, len(self.passages), step):
            error = complaint = ""
            try:
                passage = self.passages[position]
                path = self.out / self.name(passage)
                if not _is_whole(path):
                    image, complaint = draw(passage, self.style)
                    atomic_write(path, png(image), sync=False)  # that would cost more than drawing
            except DataError as found:
                error = str(found)
            yield position, error, complaint

    def name(self, passage: Passage) -> str:
        """The file of a passage's picture, under `out`; DataError where its source is not there."""
        if passage.image:
            file, page = split_page(passage.image)
            drawn_from: list[Any] = [_hash_file(file), page and [page, PAGE_DPI], self.style.max_side]
        else:
            layout, font = _choice(passage.id, self.style)
            drawn_from = [asdict(LAYOUTS[layout]), font and _hash_file(font), passage.title, passage.text]
            drawn_from += [self.style.width, self.style.height, self.style.font_size, self.style.shows]
        content = json.dumps([_DRAWING, drawn_from]).encode()
        digest = blake2b(content, digest_size=8).hexdigest()
        readable = re.sub(r"[^a-z0-9]+", "-", passage.id.lower()).strip("-")[-40:]
        return f"pages/{digest[:2]}/{readable}-{digest}.png"

    def rows(self, broken: set[int]) -> Iterator[dict[str, Any]]:
        """The lines of the corpus: the passages as they were, with the names of their pictures."""
        for position in range(len(self.passages)):
            if position not in broken:
                passage = self.passages[position]
                yield passage_row(passage, self.out) | {"image": self.name(passage)}


def _choice(id_: str, style: Style) -> tuple[str, str]:
    """The layout and the font of a passage: by its id, so that neither order nor processes matter."""
    number = hash_text(id_)
    fonts = style.fonts or ("",)
    return style.layouts[number % len(style.layouts)], fonts[number // 1009 % len(fonts)]


def _hash_file(path: str) -> str:
    try:
        status = os.stat(path)
        return _hash_of(path, status.st_size, status.st_mtime_ns)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {unreadable(error)}") from error


@lru_cache(maxsize=1024)
def _hash_of(path: str, size: int, changed: int) -> str:
    """Hash a file's bytes; a PDF of many pages is read once."""
    with open(path, "rb") as file:
        return file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()


def _is_whole(path: Path) -> bool:
    """Return whether a picture is there with its end: after a power cut a renamed file may be empty."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(_PNG_END), os.SEEK_END)
            return file.read() == _PNG_END
    except OSError:
        return False
