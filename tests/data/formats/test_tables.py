"""Rows of every kind of file: places, marks, line ends, quotes, and what is said of broken ones."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.errors import DataError
from data.formats.rows import answers_of
from data.formats.tables import fields_of, read_rows, table_line

ROWS = [{"query": 'the "end', "passage": "Köln, a\\b"}, {"query": "two", "passage": '"Two" more'}]
TSV = "query\tpassage\n" + "".join(f"{row['query']}\t{row['passage']}\n" for row in ROWS)
CSV = 'query,passage\n"the ""end","Köln, a\\b"\ntwo,"""Two"" more"\n'
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
ARRAY = json.dumps(ROWS, indent=1)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "text"), [("a.tsv", TSV), ("a.csv", CSV), ("a.jsonl", LINES), ("a.json", ARRAY)]
)
def test_rows_are_the_same_from_every_kind_of_file(tmp_path, name, text, packed, end, mark):
    content = mark + text.replace("\n", end).encode()
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(content) if packed else content)
    found = dict(read_rows(path))
    assert list(found.values()) == ROWS
    places = {"tsv": [":2", ":3"], "csv": [":2", ":3"], "jsonl": [":1", ":2"], "json": [": row 1", ": row 2"]}
    assert list(found) == [f"{path}{place}" for place in places[name[2:]]]


def test_a_table_of_windows_in_utf_16_is_read(tmp_path):
    (tmp_path / "a.tsv").write_bytes(TSV.encode("utf-16"))
    assert [row for _, row in read_rows(tmp_path / "a.tsv")] == ROWS


def test_tsv_has_no_quotes_and_csv_has_fields_of_several_lines(tmp_path):
    (tmp_path / "a.tsv").write_text('a\tb\n"one\tx\ntwo"\ty\n')
    assert [row["a"] for _, row in read_rows(tmp_path / "a.tsv")] == ['"one', 'two"']
    (tmp_path / "a.csv").write_text('a,b\n"one\nline",x\n\n"say ""hi""",y\n')
    assert [row["a"] for _, row in read_rows(tmp_path / "a.csv")] == ["one\nline", 'say "hi"']


def test_an_array_larger_than_what_is_read_at_once_comes_whole(tmp_path):
    rows = [{"id": n, "text": '][{,"' * (n % 7) * 100} for n in range(9000)]
    (tmp_path / "a.json").write_text("\n " + json.dumps(rows, indent=2) + "\n")
    assert [row for _, row in read_rows(tmp_path / "a.json")] == rows
    (tmp_path / "b.json").write_text(" [ ]\n")
    assert list(read_rows(tmp_path / "b.json")) == []


def test_parquet_rows_have_the_same_values(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet")) == [
        (f"{tmp_path / 'a.parquet'}: row {n}", row) for n, row in enumerate(ROWS, start=1)
    ]


@pytest.mark.parametrize(
    ("name", "text", "wrong"),
    [
        ("a.json", '[{"id": 1},\n]', r"a.json:2: not valid JSON"),
        ("a.json", '[{"id": 1}\n {"id": 2}]', r"a.json:1: not valid JSON \(Expecting ',' or '\]'\)"),
        ("a.json", '[{"id": 1},\n\n{"id": 2', r"a.json:3: not valid JSON"),
        ("a.json", '[{"id": 1}] x', r"a.json: holds more after the end of its array"),
        ("a.json", '[{"id": 1}, null]', r"a.json: row 2: expected an object"),
        ("a.json", '[{"id": ' + "[" * 100_000, r"a.json: row 1: nested too deeply"),
        ("a.tsv", "a\tb\n1\t2\t3\n", r"a.tsv:2: expected 2 fields, found 3"),
        ("a.csv", "a,b\n1\n", r"a.csv:2: expected 2 fields, found 1"),
        ("a.csv", 'a,b\n1,"2\n', r"a.csv:\d: not valid CSV"),
        ("a.csv", "a;b\n1;2\n", r"a.csv:1: ';' between columns: .csv has commas there"),
        ("a.tsv", "a,b\n1,2\n", r"a.tsv:1: ',' between columns: .tsv has tabs there"),
        ("a.csv", "a,a\n1,2\n", r"a.csv:1: a column stands there twice: a, a"),
        ("a.parquet", "nonsense", r"a.parquet: cannot be read"),
        ("a.jsonl.gz", "not packed", r"a.jsonl.gz: cannot be read"),
        ("a.csv", "a,b\n\udcff,2\n", r"a.csv: cannot be read: not UTF-8 \(it holds the byte 0xff\); iconv"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, text, wrong):
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=wrong) as caught:
        list(read_rows(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_fields_have_tabs_between_or_blanks():
    assert fields_of("q1\tGrey heron\t1", 3, 4) == ["q1", "Grey heron", "1"]
    assert fields_of(" q1  0 d1\t1", 3, 4) == ["q1", "0", "d1", "1"]
    assert fields_of('q1,"a, b",1', 3, comma=True) == ["q1", "a, b", "1"]
    assert fields_of("q1 Q0 d1 1 2 my run", 6, open_end=True)[-1] == "my run"
    with pytest.raises(ValueError, match="2 fields, expected 3 or 4"):
        fields_of("q1 1", 3, 4)


@pytest.mark.parametrize("field", ["a\tb", "a\nb", "a\rb", "", " ", "\ufeffa", "\ud83d"])
def test_what_a_table_cannot_hold_is_refused_by_name(field):
    with pytest.raises(ValueError, match="as the first field: a table cannot hold it"):
        table_line(field, "x")
    assert table_line(" a b", "x\ufeff\u2028", 1) == " a b\tx\ufeff\u2028\t1\n"


def test_half_a_surrogate_pair_in_an_array_or_in_a_list_in_a_string_is_replaced(tmp_path):
    (tmp_path / "a.json").write_text(
        '[{"a": "x \\ud83d y", "b": "[\\"\\\\ud83d\\"]"}, {"a": "\\ud83d\\ude00"}]'
    )
    [(_, first), (_, second)] = read_rows(tmp_path / "a.json")
    assert (first["a"], second["a"]) == ("x \ufffd y", "😀")
    assert answers_of(first["b"]) == ("\ufffd",)
