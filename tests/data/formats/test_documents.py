"""Documents to passages: whole sentences, stable ids, titles from headings, errors that name the file."""

import bz2
import codecs
import os
from itertools import pairwise

import pytest

from data.corpus import Corpus
from data.errors import DataError
from data.formats.documents import chunk, passages_of, read_sections
from data.jsonl import write_jsonl

DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="de">
<siteinfo><sitename>W</sitename><dbname>dewiki</dbname><base>http://x</base><generator>g</generator>
<case>first-letter</case><namespaces><namespace key="0" case="first-letter"/>
<namespace key="6" case="first-letter">Datei</namespace></namespaces></siteinfo>
<page><title>Loire</title><ns>0</ns><id>7</id><revision><id>1</id><timestamp>2020-01-01T00:00:00Z</timestamp>
<model>wikitext</model><format>text/x-wiki</format><text xml:space="preserve">{{Infobox|a=b}}
[[Datei:Loire.jpg|mini|A picture.]] The '''Loire''' is a [[river|long river]] in France.&lt;ref&gt;
A book.&lt;/ref&gt;

== Course ==
It flows to the [[Atlantic]].
{| class="wikitable"
| cell
|}
</text></revision></page>
<page><title>Liger</title><ns>0</ns><id>8</id><redirect title="Loire"/><revision><id>2</id>
<timestamp>2020-01-01T00:00:00Z</timestamp><text>#REDIRECT [[Loire]]</text></revision></page>
<page><title>Talk</title><ns>1</ns><id>9</id><revision><id>3</id>
<timestamp>2020-01-01T00:00:00Z</timestamp><text>chatter</text></revision></page>
</mediawiki>"""


@pytest.mark.parametrize(
    ("text", "words", "overlap", "pieces"),
    [
        ("A b. C d. E f.", 4, 0, ["A b. C d.", "E f."]),
        ("A b. C d. E f.", 4, 2, ["A b. C d.", "C d. E f."]),
        ("A b! C d?  E\nf", 100, 0, ["A b! C d? E f"]),
        ("one two three four five", 2, 0, ["one two", "three four", "five"]),
        ("今日は晴れ。明日は雨。", 5, 0, ["今日は晴れ。", "明日は雨。"]),
        (" \n ", 5, 0, []),
    ],
)
def test_pieces_are_whole_sentences(text, words, overlap, pieces):
    assert list(chunk(text, words, overlap)) == pieces


def test_no_word_is_lost_and_no_piece_is_too_long():
    text = " ".join(f"Sentence {i} has {'very ' * (i % 7)}few words." for i in range(60))
    pieces = list(chunk(text, 12))
    assert " ".join(pieces) == text
    assert max(len(piece.split()) for piece in pieces) <= 12
    repeated = list(chunk(text, 30, 12))
    assert all(first.split()[-1] in second for first, second in pairwise(repeated))
    assert max(len(piece.split()) for piece in repeated) <= 30


def sections(tmp_path, name: str, content: str | bytes) -> list[tuple[str, str]]:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [(section.title, " ".join(section.text.split())) for section in read_sections(path)]


def test_markdown_is_titled_by_its_headings(tmp_path):
    text = "---\ntags: x\n---\n# Guide\nStart *here*.\n\n## Install\n- one\n- two\n\n```sh\npip\n```\n"
    assert sections(tmp_path, "a.md", text) == [("Guide", "Start here."), ("Guide: Install", "one two pip")]


def test_html_leaves_out_what_is_no_text(tmp_path):
    html = """<html><head><title>Site &amp; page</title><style>p {}</style></head><body><nav>Menu</nav>
    <p>First<b>ly</b> this.<p>Then <script>no()</script>that.<h2>More</h2><div>a<br>b</div>
    <footer>c</footer>"""
    expected = [("Site & page", "Firstly this. Then that."), ("Site & page: More", "a b")]
    assert sections(tmp_path, "a.html", html) == expected
    latin = '<meta charset="iso-8859-1"><h1>Caf\xe9</h1>cr\xe8me'.encode("latin-1")
    assert sections(tmp_path, "b.htm", latin) == [("Café", "crème")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", codecs.BOM_UTF16_LE + "crème".encode("utf-16-le")),
        ("a.md", codecs.BOM_UTF16_BE + "crème".encode("utf-16-be")),
        ("a.html", "<p>cr\xe8me".encode("latin-1")),
        ("b.html", '<meta charset="klingon"><p>cr\xe8me'.encode("latin-1")),
        ("c.html", "<p><![if gte mso 9]>crème<![endif]> &#xFFFFFFF;".encode()),
    ],
)
def test_other_encodings_and_odd_markup_are_read(tmp_path, name, content):
    [(_, text)] = sections(tmp_path, name, content)
    assert text.rstrip(" \ufffd") == "crème"


def test_a_run_of_characters_without_end_is_cut():
    assert [len(piece) for piece in chunk("x" * 1000, words=4)] == [400, 400, 200]


def test_plain_text_is_titled_by_its_name(tmp_path):
    assert sections(tmp_path, "notes.txt", "\ufeffA\nb.\n\nC.") == [("notes", "A b. C.")]


@pytest.mark.parametrize("packed", [False, True])
def test_a_wikipedia_dump_gives_articles_by_section(packed, tmp_path):
    pytest.importorskip("mwxml")
    pytest.importorskip("mwparserfromhell")
    path = tmp_path / ("dump.xml.bz2" if packed else "dump.xml")
    path.write_bytes(bz2.compress(DUMP.encode()) if packed else DUMP.encode())
    rows = list(passages_of(path, tmp_path))
    assert [(row["id"], row["title"], row["text"]) for row in rows] == [
        ("7#0", "Loire", "The Loire is a long river in France."),
        ("7#1", "Loire: Course", "It flows to the Atlantic."),
    ]
    assert rows[0]["metadata"]["page_id"] == 7


def tiny_pdf(text: str) -> bytes:
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
    ]
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    tail = b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, len(out))
    return out + head + table + tail


def test_pdf_pages_are_read_and_named(tmp_path):
    pytest.importorskip("pypdf")
    (tmp_path / "paper.pdf").write_bytes(tiny_pdf("The Rhine flows north."))
    [row] = passages_of(tmp_path / "paper.pdf", tmp_path)
    assert (row["title"], row["text"]) == ("paper", "The Rhine flows north.")
    assert row["metadata"] == {"source": "paper.pdf", "page": 1}


def test_passages_make_a_corpus_with_the_same_ids_every_time(tmp_path):
    folder = tmp_path / "docs" / "deep"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("One two three. Four five six. Seven.")
    rows = [list(passages_of(folder / "a.txt", tmp_path / "docs", words=3)) for _ in range(2)]
    assert rows[0] == rows[1]
    assert [row["id"] for row in rows[0]] == ["deep/a.txt#0", "deep/a.txt#1", "deep/a.txt#2"]
    write_jsonl(tmp_path / "corpus.jsonl", rows[0])
    assert Corpus(tmp_path / "corpus.jsonl")[1].metadata == {"source": "deep/a.txt"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"\xff\xfc\x00", r"a.txt: cannot be read: not UTF-8 from byte 0 on; iconv"),
        ("a.pdf", b"no pdf", r"a.pdf: cannot be read: "),
        ("a.xml", b"<html>no dump</html>", r"a.xml: cannot be read: "),
        ("a.docx", b"", r"a.docx: must end in .txt, .md, .html, .htm, .pdf, .xml"),
    ],
)
def test_what_cannot_be_read_is_named(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        list(passages_of(tmp_path / name, tmp_path))


def test_file_names_that_no_table_holds_give_ids_that_differ(tmp_path):
    """Two names that are not UTF-8 stay two; a tab or a line end in a name is written as its escape."""
    for name in (b"\xfe.txt", b"\xff.txt", b"a\tb.txt", b"a\nb.txt", b"a b.txt"):
        (tmp_path / os.fsdecode(name)).write_text("The heron waits.")
    rows = [row for path in sorted(tmp_path.iterdir()) for row in passages_of(path, tmp_path)]
    assert sorted(row["id"] for row in rows) == [
        r"\udcfe.txt#0", r"\udcff.txt#0", "a b.txt#0", r"a\nb.txt#0", r"a\tb.txt#0",
    ]  # fmt: skip
    assert [row["title"] for row in rows if row["id"].startswith(r"\ud")] == ["\ufffd"] * 2
