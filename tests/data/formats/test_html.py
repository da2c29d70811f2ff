"""HTML: labels as browsers read them, and no page that vanishes for one element that is not closed."""

import codecs

import pytest

from data.formats.html import decode_html, html_sections


def read(html: str) -> list[tuple[str, str]]:
    return [(title, " ".join(text.split())) for title, text in html_sections(html, "file")]


@pytest.mark.parametrize(
    ("label", "codec", "text"),
    [
        ("gb2312", "gb18030", "朱镕基"), ("gbk", "gb18030", "朱镕基"),
        ("GB_2312-80", "gbk", "长沙"), ("x-gbk", "gbk", "长沙"),
        ("shift_jis", "cp932", "①髙橋～"), ("x-sjis", "cp932", "①髙橋"), ("windows-31j", "cp932", "①"),
        ("euc-jp", "euc_jisx0213", "①東京"), ("iso-2022-jp", "iso2022_jp", "東京"),
        ("euc-kr", "cp949", "똠방각하"), ("ks_c_5601-1987", "cp949", "똠"), ("big5", "big5hkscs", "碁①䏰"),
        ("iso-8859-1", "cp1252", "“café” €"), ("latin1", "cp1252", "’"), ("us-ascii", "cp1252", "é"),
        ("iso-8859-9", "cp1254", "ğ€"), ("koi8-r", "koi8-r", "Рим"), ("windows-1251", "cp1251", "Рим"),
        ("utf-8", "utf-8", "鷺"), ("utf8", "utf-8", "鷺"), ("utf-16", "utf-8", "鷺"),
        ("unicode", "utf-8", "鷺"),
        ("utf-8", "cp1252", "café"), ("klingon", "cp1252", "café"), ("klingon", "utf-8", "café"),
    ],
)  # fmt: skip
def test_a_label_means_what_browsers_take_it_for(label, codec, text):
    for head in (f'<meta charset="{label}">', f"<meta http-equiv=x content='text/html; Charset = {label}'>"):
        assert read(decode_html((head + "<p>").encode() + text.encode(codec))) == [("file", text)]
    assert text in decode_html(f'<?xml version="1.0" encoding="{label}"?>'.encode() + text.encode(codec))


@pytest.mark.parametrize("codec", ["utf-8", "utf-16-le", "utf-16-be"])
def test_a_byte_order_mark_goes_before_the_label(codec):
    marks = {"utf-8": codecs.BOM_UTF8, "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}
    raw = marks[codec] + '<meta charset="gbk"><title>Höhe</title>鷺'.encode(codec)
    assert read(decode_html(raw)) == [("Höhe", "鷺")]


def test_a_broken_byte_costs_one_character():
    assert decode_html(b'<meta charset="euc-kr">a\xff' + "똠".encode("cp949")).endswith("a\ufffd똠")


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("<form><p>All of it<div>in one form</div></form>", [("file", "All of it in one form")]),
        ("<form><input><select><option>x</select><button>Go</button>text</form>", [("file", "text")]),
        ("<body><nav><ul><li>menu</ul><p>The article.", [("file", "menu The article.")]),
        ("<div><nav><ul><li>menu</ul></div><p>The article.</body></html>", [("file", "menu The article.")]),
        ("<nav>a<nav>b</nav>c</nav>text", [("file", "text")]),
        ("<header><h1>Page</h1>menu</header>text<footer>x</footer>", [("Page", "text")]),
        ("<aside>The article<h2>Part</h2>and more", [("file", "The article"), ("file: Part", "and more")]),
        ("<h2>Part<p>The article.", [("file", "Part The article.")]),
        ("<nav><h2>Menu</h2></nav>text", [("file", "text")]),
        ("<title>P</title><h2>A</h2>one<nav><h2>Menu</h2></nav>two", [("P: A", "one two")]),
        ("<svg><title>icon</title></svg><title>Page</title>text", [("Page", "text")]),
        ("<svg><title>icon</title><h1>Page</h1></svg><p>text", [("file", "text")]),
        ("<body><svg><title>icon</title><path><p>text", [("file", "icon text")]),
        ("<h1><div>Big</div> page</h1>text", [("Big page", "text")]),
        ("<script src=a.js/></script>text<script>a = '<nav>'</script><p>more", [("file", "text more")]),
        ("<template><p>x</template><noscript>on!</noscript>text", [("file", "text")]),
        ("", []), ("<nav>only</nav>", []), ("<script>f()", []),
    ],
)  # fmt: skip
def test_what_is_left_out_ends_where_it_says(html, expected):
    assert read(html) == expected


def test_a_page_of_many_open_elements_is_read_in_one_pass():
    assert read("<div>" * 8000 + "x" + "</p>" * 8000 + "<p>" * 8000 + "y") == [("file", "x y")]
