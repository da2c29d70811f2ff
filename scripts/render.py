"""`sleuth render`: passages, PDF and HTML pages or images in, pictures and a corpus that names them out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from data.errors import ConfigError, require
from data.machine.processes import cores
from data.text import counted
from scripts.console import track


def main(
    source: str,
    out: str,
    layouts: str = "page",
    fonts: str | None = None,
    width: int = 800,
    height: int = 1000,
    font_size: int = 20,
    shows: Literal["both", "title", "text"] = "both",
    max_side: int = 0,
    processes: int | None = None,
    on_error: Literal["stop", "skip"] = "stop",
) -> None:
    """Draw passages, or the pages of PDF and HTML files, as PNG files with a corpus that names them.

    The same source and options give the same bytes; a run that was killed goes on when it is started again.

    Args:
        source: A corpus (.jsonl), a PDF, HTML or image file, or a folder of those with all its subfolders.
        out: Folder for corpus.jsonl and pages/.
        layouts: page, columns, slide, card, note, night; of several, with commas between, a passage has one.
        fonts: Font files, with commas between; Pillow's own (English letters only) if not given.
        width: Of drawn passages, in pixels.
        height: The same.
        font_size: Of drawn text, in pixels; it is drawn smaller where it would not fit.
        shows: What of a passage is drawn: both, its title, or its text.
        max_side: Shrink images and pages of PDFs until no side is longer; 0 leaves them as they are.
        processes: How many draw; one a core if not given.
        on_error: What to do with what cannot be read or drawn: stop, or skip it and say so.
    """
    from data.pages.page_sources import find_pages
    from data.pages.rendering import Style, render

    chosen = tuple(filter(None, (fonts or "").split(",")))
    style = Style(tuple(layouts.split(",")), chosen, width, height, font_size, shows, max_side)
    require(not Path(out).is_file(), "out", out, "a folder, not a file")
    if Path(out, "corpus.jsonl").resolve() == Path(source).resolve():
        raise ConfigError(f"out = {out}: its corpus.jsonl is the source; give another folder")
    passages, skipped = find_pages(source, Path(out) / "html", on_error, track("reading files"), out)
    start = time.monotonic()
    done = render(passages, out, style, processes or cores(), on_error, track("drawing pages"))
    rate = len(passages) / max(1e-9, time.monotonic() - start)
    left_out = (
        f"; skipped {counted(skipped, 'file')} and {counted(done.skipped, 'page')}"
        if skipped or done.skipped
        else ""
    )
    print(f"{counted(done.count, 'page')} in {done.corpus} ({rate:,.0f}/s){left_out}")
