"""Documents as people keep them (text, Markdown, HTML, PDF, Wikipedia dumps), cut into passages.

A document is a stream of sections (title, text, metadata); sections are cut at the ends of sentences
into passages of about so many words. Libraries read the formats: the optional extra `corpus`.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

import regex

from data.errors import ConfigError, DataError
from data.formats.html import decode_html, html_sections
from data.formats.rows import parse_passage, passage_row, relative_to
from data.formats.tables import KINDS, at, ending_of, read_rows
from data.jsonl import numbered_jsonl
from data.text import name_of, replace_halves

# A word is a run of letters and digits, 100 of them at most; where a script writes no spaces, a character.
_WORD = regex.compile(
    r"[[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{LB=SA}]--\p{M}]"
    r"|(?:[[\p{L}\p{N}_]--[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{LB=SA}]]"
    r"[\p{M}\u200C\u200D]*){1,100}",
    regex.V1,
)
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+(?=\S)|(?<=[。！？])|\n+")


class Section(NamedTuple):
    """A piece of a document under one title; `key` tells it from the others of its file."""

    title: str
    text: str
    metadata: dict[str, Any]
    key: str = ""


def _open(path: Path) -> IO[bytes]:
    return open(path, "rb")


def passages_of(
    path: Path, root: Path, words: int = 100, overlap: int = 0, open_file: Callable[[Path], IO[bytes]] = _open
) -> Iterator[dict[str, Any]]:
    """The passages in one file, as lines of a corpus: {"id", "title", "text", "metadata"}.

    The id is the path under `root` (of a dump, the id of the page) and the number of the passage: the
    same file gives the same ids. `open_file` opens a dump, and so may watch how far it is read.
    Raises DataError "FILE: what is wrong" where it cannot be read.
    """
    name = name_of(path.relative_to(root).as_posix())
    numbers: dict[str, int] = {}
    for section in read_sections(path, open_file):
        key = section.key or name
        for text in chunk(section.text, words, overlap):
            number = numbers[key] = numbers.get(key, -1) + 1
            metadata = {"source": name, **section.metadata}
            title, text = replace_halves(section.title), replace_halves(text)
            yield {"id": f"{key}#{number}", "title": title, "text": text, "metadata": metadata}


def read_sections(path: Path, open_file: Callable[[Path], IO[bytes]] = _open) -> Iterator[Section]:
    """The sections of a file, by the end of its name; DataError where they cannot be read."""
    read = _corpus if ending_of(path) == ".jsonl" else READERS.get(path.suffix.lower())
    if path.name.endswith(DUMPS):
        read = partial(_wikipedia, open_file=open_file)
    if read is None:
        raise DataError(f"{path}: must end in {', '.join([*READERS, *DUMPS, *KINDS])}")
    try:
        yield from read(path)
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        needs = f"needs the package {error.name}: pip install 'sleuth-rl[corpus]'"
        raise ConfigError(f"{path}: {needs}") from error
    except Exception as error:  # parsers raise what they like on files that are not what they say
        named = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        reason = getattr(error, "strerror", None) or named
        raise DataError(f"{path}: cannot be read: {reason}") from error


def find_files(
    source: Path, ends: tuple[str, ...], passed_over: Path | None = None
) -> tuple[list[Path], Path]:
    """Return the files at `source`, sorted, and the folder that their names start from.

    ends: of the names of files that a folder is searched for, with all its subfolders. passed_over: a folder
    in it that is left out. Raises ConfigError where nothing is there.
    """
    if not source.exists():
        raise ConfigError(f"source = {source}: no such file or folder")
    if source.is_file():
        return [source], source.parent
    found = sorted(path for path in source.rglob("*") if path.name.lower().endswith(ends) and path.is_file())
    files = [path for path in found if not (passed_over and passed_over.resolve() in path.resolve().parents)]
    if not files:
        raise ConfigError(f"{source}: holds no file that ends in {', '.join(ends)}")
    return files, source


def is_table(path: Path) -> bool:
    """Return whether it is a file of rows other than JSON lines, such as CSV, parquet or a JSON array."""
    return path.is_file() and ending_of(path) in KINDS and ending_of(path) != ".jsonl"


def table_passages(path: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table as lines of a corpus in `folder`. Raises DataError."""
    place = ""
    for place, row in read_rows(path):
        with at(place):
            passage = parse_passage(row)
            files = {
                name: relative_to(str(path.parent / file), folder) for name, file in passage.files.items()
            }
        yield passage_row(passage, folder) | files
    if not place:
        raise DataError(f"{path}: holds no passages")


def reason_without_text(path: Path) -> str:
    """Return the reason why a file that can be read gives no passage."""
    if path.stat().st_size == 0:
        return "empty"
    reasons = {".pdf": "no text on its pages, as of a scan", ".txt": "blank", ".md": "no text"}
    reasons |= dict.fromkeys((".html", ".htm"), "no text beside navigation, scripts and controls")
    return reasons.get(path.suffix.lower(), "no articles")


def chunk(text: str, words: int, overlap: int = 0) -> Iterator[str]:
    """`text` in pieces of whole sentences, at most `words` words each unless one sentence is longer.

    A piece begins with the last sentences of the one before, as many as fit into `overlap` words.
    A sentence of more than `words` is cut between words.   "A b. C d. E f.", 4, 2 -> "A b. C d.", "C d. E f."
    """
    piece: list[str] = []
    fresh = False  # whether the piece holds more than what it repeats
    for sentence in _sentences(text, words):
        if fresh and count_words([*piece, sentence]) > words:
            yield " ".join(piece)
            while piece and (count_words(piece) > overlap or count_words([*piece, sentence]) > words):
                piece.pop(0)
            fresh = False
        piece.append(sentence)
        fresh = True
    if fresh:
        yield " ".join(piece)


def count_words(texts: Iterable[str]) -> int:
    """Return how many words the texts have; where a script writes no spaces, a character is one."""
    return sum(len(_WORD.findall(text)) for text in texts)


def _sentences(text: str, words: int) -> Iterator[str]:
    """The sentences of a text, its white space tidied; those of more than `words` words in parts."""
    start = 0
    for end in [*(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]:
        sentence, start = " ".join(text[start:end].split()), end
        places = [match.start() for match in _WORD.finditer(sentence)][::words] if sentence else []
        cuts = [0, *places[1:], len(sentence)]
        yield from (part for a, b in pairwise(cuts) if (part := sentence[a:b].strip()))


def _corpus(path: Path) -> Iterator[Section]:
    """The passages of a corpus, to be cut smaller: the file must be named, no folder is searched for them."""
    for _, record in numbered_jsonl(path):
        passage = parse_passage(record)
        yield Section(passage.title, passage.text, dict(passage.metadata), passage.id)


def _text(path: Path) -> Iterator[Section]:
    text = _decode(path.read_bytes())
    yield Section(path.stem, re.sub(r"(?<!\n)\n(?!\s*\n)", " ", text), {})  # paragraphs end in an empty line


def _markdown(path: Path) -> Iterator[Section]:
    from markdown_it import MarkdownIt

    text = _decode(path.read_bytes())
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)  # front matter
    return (Section(*found, {}) for found in html_sections(MarkdownIt().render(text), path.stem))


def _html(path: Path) -> Iterator[Section]:
    return (Section(*found, {}) for found in html_sections(decode_html(path.read_bytes()), path.stem))


def _decode(raw: bytes) -> str:
    """UTF-8, or UTF-16 with its mark; lines end in newlines. DataError for another encoding."""
    try:
        marked = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return raw.decode("utf-16" if marked else "utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 from byte {error.start} on; iconv makes it of other encodings") from error


def _pdf(path: Path) -> Iterator[Section]:
    from pypdf import PdfReader

    reader = PdfReader(path)
    title = str((reader.metadata and reader.metadata.title) or path.stem)
    for number, page in enumerate(reader.pages, start=1):
        text = re.sub(r"(?<=\w)-\n(?=[a-z])", "", page.extract_text())  # words that a line end divides
        yield Section(title, text.replace("\n", " "), {"page": number})


def _wikipedia(path: Path, open_file: Callable[[Path], IO[bytes]]) -> Iterator[Section]:
    import mwxml

    with open_file(path) as packed, _unpacked(packed, path.suffix) as file:
        dump = mwxml.Dump.from_file(file)
        spaces = dump.site_info.namespaces or []
        media = {"file", "image", "category", *(s.name.lower() for s in spaces if s.id in (6, 14) and s.name)}
        for page in dump.pages:
            text = next((revision.text for revision in page), None)
            if page.namespace == 0 and page.title and not page.redirect and text:
                for heading, plain in _wikitext(text, media):
                    title = f"{page.title}: {heading}" if heading else page.title
                    yield Section(title, plain, {"page_id": page.id}, key=str(page.id))


def _wikitext(text: str, media: set[str]) -> Iterator[tuple[str, str]]:
    """Heading and plain text of each section of an article; tables, templates and pictures are left out."""
    import mwparserfromhell

    for section in mwparserfromhell.parse(text).get_sections(flat=True, include_lead=True):
        headings = section.filter_headings()
        heading = headings[0].title.strip_code().strip() if headings else ""
        links = section.filter_wikilinks()
        left_out = [
            *headings,
            *section.filter_tags(matches=lambda tag: str(tag.tag) in ("table", "ref", "gallery", "math")),
            *(link for link in links if str(link.title).partition(":")[0].strip().lower() in media),
        ]
        for node in left_out:
            with suppress(ValueError):  # it lay in another that has gone
                section.remove(node)
        plain = section.strip_code().strip()
        if plain:
            yield heading, plain


def _unpacked(file: IO[bytes], suffix: str) -> IO[str]:
    unpack: dict[str, Any] = {".bz2": bz2.open, ".gz": gzip.open}
    return io.TextIOWrapper(unpack[suffix](file) if suffix in unpack else file, encoding="utf-8")


DUMPS = (".xml", ".xml.bz2", ".xml.gz")
READERS = {".txt": _text, ".md": _markdown, ".html": _html, ".htm": _html, ".pdf": _pdf}
