"""Sources of pages to render: the passages of a corpus, the pages of PDF and HTML files, images.

A page of a PDF becomes a passage whose text is what the PDF says is written there. HTML is printed to PDF
by a headless Chromium, where one is installed, that can reach no network.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from data.atomic import atomic_write
from data.corpus import Corpus
from data.errors import ConfigError, DataError
from data.formats.documents import find_files
from data.pages.images import check_pdf_reader, read_pdf
from data.records import Passage
from data.text import name_of

logger = logging.getLogger(__name__)

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
HTML = (".html", ".htm", ".xhtml")
ENDS = (".pdf", *HTML, *IMAGES)
"""Endings of the files that a folder is searched for."""

_CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_DATES = re.compile(rb"/(?:Creation|Mod)Date \(D:([^)]*)\)")
_NAMED = re.compile(r"""(?:src|href)\s*=\s*(["']?)([^"'>]+?)\1(?=[\s/>])""", re.IGNORECASE)
_PRINT_SECONDS = 60.0


def find_pages(
    source: str | Path, scratch: str | Path, on_error: Literal["stop", "skip"] = "stop",
    progress: Callable[[Sequence[Path], int], Iterator[Path]] | None = None, passed_over: str | Path = "",
) -> tuple[Corpus | Sequence[Passage], int]:  # fmt: skip
    """The passages at `source`, and how many files were left out as broken.

    source: a corpus (.jsonl), a file, or a folder that is searched with all its subfolders. Ids are paths
    under it, of PDF and HTML files with their page: "a/b.pdf#page=3"; `image` names the file or the page.
    scratch: folder for the PDFs that HTML becomes. passed_over: a folder under `source` that is none of it,
    such as that of the pages that are drawn from it. Raises ConfigError where nothing is there, DataError
    naming a file that cannot be read, unless on_error="skip".
    """
    source = Path(source)
    if source.suffix == ".jsonl":
        return Corpus(source), 0
    if source.is_file() and source.suffix.lower() not in ENDS:
        raise ConfigError(f"source = {source}: must end in .jsonl, {', '.join(ENDS)}")
    files, root = find_files(source, ENDS, Path(passed_over or scratch))
    passages: list[Passage] = []
    skipped = 0
    for path in progress(files, len(files)) if progress else files:
        try:
            passages += pages_in(path, root, Path(scratch))
        except DataError as error:
            if on_error == "stop":
                raise DataError(f"{error} (--on_error skip leaves such files out)") from error
            skipped += 1
            logger.warning("skipped: %s", error)
    if not passages:
        raise DataError(f"{source}: no pages in {len(files)} files")
    return passages, skipped


def pages_in(path: Path, root: Path, scratch: Path) -> list[Passage]:
    """The passages of one file: a page each, or the image itself; named by its path under `root`."""
    name, end = name_of(path.relative_to(root).as_posix()), path.suffix.lower()
    if end in IMAGES:
        return [Passage(name, "", path.stem, {"source": name}, str(path))]
    check_pdf_reader(path)  # before Chromium prints a file that nobody could read
    pdf = print_html(path, scratch) if end in HTML else path
    title, texts = read_pdf(pdf)
    return [
        Passage(f"{name}#page={n}", text, title or path.stem, {"source": name, "page": n}, f"{pdf}#page={n}")
        for n, text in enumerate(texts, start=1)
    ]


def print_html(path: Path, scratch: Path) -> Path:
    """A PDF in `scratch` of an HTML file; one that is there is taken if neither it nor what it names changed.

    What else the page shows (style sheets, pictures) must lie beside it: nothing is fetched. Raises
    ConfigError where no Chromium is installed, DataError naming the file where it cannot print.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    drawn_from = "\n".join([str(path.parent.resolve()), *_beside(path, content)])
    pdf = scratch / f"{blake2b(content + drawn_from.encode(), digest_size=8).hexdigest()}.pdf"
    if not pdf.is_file():
        with tempfile.TemporaryDirectory(prefix="sleuth-html-") as folder:
            atomic_write(pdf, _printed(path, Path(folder)))
    return pdf


def _beside(path: Path, content: bytes) -> Iterator[str]:
    """Names, sizes and times of the files beside an HTML file that it names: pictures, style sheets."""
    for _, name in sorted(set(_NAMED.findall(content.decode("utf-8", "replace")))):
        try:
            about = os.stat(path.parent / unquote(name))
        except (OSError, ValueError):
            continue  # no file: another page, an address, a place in this one
        yield f"{name} {about.st_size} {about.st_mtime_ns}"


def find_chromium() -> str | None:
    """The first Chromium on the path, or None."""
    return next(filter(None, map(shutil.which, _CHROMIUMS)), None)


def _printed(path: Path, folder: Path) -> bytes:
    if (browser := find_chromium()) is None:
        raise ConfigError(
            f"{path}: needs Chromium to draw HTML: none of {', '.join(_CHROMIUMS)} is installed"
        )
    out = folder / "out.pdf"
    command = [
        browser, "--headless", "--disable-gpu", "--no-first-run", "--disable-extensions",
        f"--user-data-dir={folder / 'profile'}", "--no-pdf-header-footer",
        "--proxy-server=127.0.0.1:9", "--proxy-bypass-list=<-loopback>",  # whatever it would fetch
        "--virtual-time-budget=10000", f"--print-to-pdf={out}", path.resolve().as_uri(),
    ]  # fmt: skip
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.insert(1, "--no-sandbox")  # its sandbox does not work for root
    try:
        subprocess.run(command, capture_output=True, timeout=_PRINT_SECONDS, check=True)
        return _DATES.sub(_undated, out.read_bytes())  # the same file, the same bytes
    except subprocess.TimeoutExpired as error:
        waits = "where a script opens a dialog, such as an alert, it waits for ever"
        raise DataError(f"{path}: Chromium has not printed it in {_PRINT_SECONDS:g} s; {waits}") from error
    except (subprocess.SubprocessError, OSError) as error:
        raise DataError(f"{path}: Chromium could not print it: {type(error).__name__}") from error


def _undated(found: re.Match[bytes]) -> bytes:
    return found[0].replace(found[1], re.sub(rb"\d", b"0", found[1]))  # of the same length: PDFs count bytes
