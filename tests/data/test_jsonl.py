"""JSON lines: what is read, how a wrong line is named, and that a failed write changes nothing."""

import errno
import gzip
import json
import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.atomic import atomic_write, open_atomic
from data.corpus import Corpus
from data.errors import ConfigError, DataError, StorageError
from data.formats.trec import load_qrels
from data.jsonl import (
    append_in_batches,
    append_jsonl,
    read_json,
    read_jsonl,
    read_text,
    write_json,
    write_jsonl,
)
from data.questions import load_questions
from data.yaml_file import read_yaml

RECORDS = [{"id": "1", "text": "naïve\u2028東京"}, {"id": "2", "text": "no pair"}]
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "new/folder/a.jsonl"])
def test_what_is_written_is_read_back(tmp_path, name):
    write_jsonl(tmp_path / name, RECORDS)
    assert list(read_jsonl(tmp_path / name)) == RECORDS


@given(st.lists(st.dictionaries(st.text(), JSON_VALUES), max_size=4))
def test_any_records_come_back(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    write_jsonl(path, records)
    assert list(read_jsonl(path)) == records


def test_gz_is_really_compressed_and_the_same_each_time(tmp_path):
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_jsonl(tmp_path / name, RECORDS)
    packed = (tmp_path / "a.jsonl.gz").read_bytes()
    assert packed == (tmp_path / "b.jsonl.gz").read_bytes()
    assert len(gzip.decompress(packed).splitlines()) == 2


def test_blank_lines_marks_and_windows_line_ends_are_no_trouble(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert [record["a"] for record in read_jsonl(path)] == [1, 2]


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        (b'{"a": 1},\n', r"not valid JSON \(one object a line, no comma after it: column 9\)"),
        (b'{"a": 1', r"not valid JSON \(Expecting ',' delimiter: column 8\)"),
        (b"[1, 2]", r"expected an object {...}, found an array"),
        (b"null", "found null"),
        (b"\x28\xb5\x2f\xfd\x04\x68", "compressed by zstd"),
        (gzip.compress(b"{}", mtime=0), "compressed by gzip"),
        (b'{"a": "\xff"}', r"not valid UTF-8 \(byte 8 of the line\)"),
        (b'{"a":' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
    ],
)
def test_malformed_line_is_named(tmp_path, line, wrong):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 0}\n\n' + line + b'\n{"a": 3}\n')
    with pytest.raises(DataError, match=rf"a\.jsonl:3: .*{wrong}") as caught:
        list(read_jsonl(path))
    assert "\n" not in str(caught.value)


def test_records_before_the_malformed_line_are_streamed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 0}\nnonsense\n')
    assert next(read_jsonl(path)) == {"a": 0}


def test_missing_file_is_said_before_the_first_record_is_asked_for(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read_jsonl(tmp_path)


@pytest.mark.parametrize(
    "read",
    [read_jsonl, read_json, read_text, read_yaml, Corpus, load_questions, load_qrels],
    ids=lambda read: read.__name__,
)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, read):
    path = tmp_path / "pipe.jsonl"
    os.mkfifo(path)
    keeps_open = os.open(path, os.O_RDWR)
    with pytest.raises((DataError, ConfigError), match=r"pipe\.jsonl: is a pipe or device, expected a file"):
        read(path if read is not load_questions else str(path))
    os.close(keeps_open)


@pytest.mark.parametrize("keep", [0.5, None])
def test_broken_gzip_is_a_data_error(tmp_path, keep):
    path = tmp_path / "a.jsonl.gz"
    write_jsonl(path, [{"a": os.urandom(50).hex()} for _ in range(100)])
    packed = path.read_bytes()
    path.write_bytes(packed[: int(len(packed) * keep)] if keep else b"plain text\n")
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read after line \d+"):
        list(read_jsonl(path))


def test_cut_tail_is_left_out_only_when_asked_wherever_the_cut_is(tmp_path):
    path = tmp_path / "a.jsonl"
    whole = b'{"a": "\xc3\xa9"}\n{"b": "\xc3\xa8"}\n'
    first = whole.index(b"\n") + 1
    for cut in range(first + 1, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert list(read_jsonl(path, tolerate_cut_tail=True)) in ([{"a": "é"}],), cut
        with pytest.raises(DataError, match=":2: "):
            list(read_jsonl(path))
    path.write_bytes(whole[:-1])  # only the newline is missing: the object is whole
    assert len(list(read_jsonl(path, tolerate_cut_tail=True))) == 2


def test_malformed_line_inside_is_an_error_even_where_a_cut_tail_is_allowed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a"\n{"b": 1}\n')
    with pytest.raises(DataError, match=":1: "):
        list(read_jsonl(path, tolerate_cut_tail=True))
    path.write_bytes(b'{"b": 1}\n{"a"\n')  # a whole line was written, and it is wrong
    with pytest.raises(DataError, match=":2: "):
        list(read_jsonl(path, tolerate_cut_tail=True))


@pytest.mark.parametrize(
    ("tail", "expected"),
    [(b"", [0, 9]), (b'{"a": 1}', [0, 1, 9]), (b'{"a": "' + b"x" * 200_000, [0, 9])],
)
def test_append_glues_nothing_to_a_cut_line(tmp_path, tail, expected):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 0}\n' + tail)
    append_jsonl(path, [{"a": 9}])
    assert [record["a"] for record in read_jsonl(path)] == expected


def test_append_makes_the_file(tmp_path):
    append_jsonl(tmp_path / "new" / "a.jsonl", RECORDS)
    assert list(read_jsonl(tmp_path / "new" / "a.jsonl")) == RECORDS


@pytest.mark.parametrize("writer", [write_json, append_jsonl])
def test_full_disk_is_a_storage_error_and_the_old_file_stays(tmp_path, monkeypatch, writer):
    path = tmp_path / "a.json"
    path.write_text('{"old": 1}\n')

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"a\.json: cannot be written: No space left on device"):
        writer(path, [{"new": 2}])
    assert path.read_text().startswith('{"old": 1}\n')
    assert os.listdir(tmp_path) == ["a.json"]


def test_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write_jsonl(tmp_path / "file" / "deeper" / "a.jsonl", [])


def test_a_folder_in_the_place_of_a_file_is_refused_before_anything_is_made(tmp_path):
    def unread():
        raise AssertionError("must not be asked")
        yield {}

    out = tmp_path / "folder"
    out.mkdir()
    for write in (
        lambda: write_jsonl(out, unread()),
        lambda: append_in_batches(out, 3, 1, lambda _: unread()),
    ):
        with pytest.raises(StorageError, match="folder: cannot be written: is a folder, expected a file"):
            write()
    assert os.listdir(tmp_path) == ["folder"]


def test_failure_in_the_block_keeps_the_old_file_and_its_own_error(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    for error in (KeyboardInterrupt(), FileNotFoundError(2, "no", "other"), ConnectionError("x")):
        with pytest.raises(type(error)), open_atomic(path) as file:
            file.write("new")
            raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_atomic_file_goes_through_a_link_and_uses_the_usual_permissions(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "real" / "a.txt")
    with open_atomic(tmp_path / "link.txt") as file:
        file.write("é")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real" / "a.txt").read_bytes() == "é".encode()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("real/a.txt", "plain")}
    assert len(modes) == 1


def test_a_pipe_is_written_into_and_stays_one(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    atomic_write(pipe, "text")
    assert os.read(reader, 10) == b"text" and stat.S_ISFIFO(pipe.stat().st_mode)
    os.close(reader)


def test_a_text_of_somebody_loses_its_mark_and_another_encoding_is_named(tmp_path):
    (tmp_path / "ids").write_bytes("a\nb".encode("utf-8-sig"))
    assert read_text(tmp_path / "ids").splitlines() == ["a", "b"]
    (tmp_path / "ids").write_bytes("a".encode("utf-16"))
    with pytest.raises(DataError, match=r"ids: cannot be read: .utf-8. codec"):
        read_text(tmp_path / "ids")


def test_text_and_bytes_replace_a_file(tmp_path):
    for content in ("naïve\r\n", b"\xff"):
        atomic_write(tmp_path / "a", content)
        written = (tmp_path / "a").read_bytes()
        assert written == (content if isinstance(content, bytes) else content.encode())


def test_json_comes_back_and_its_faults_are_named(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"é": [1, None]})
    assert read_json(path) == json.loads(path.read_text()) == {"é": [1, None]}
    path.write_text('{\n"a": }')
    with pytest.raises(DataError, match=r"a\.json:2: not valid JSON"):
        read_json(path)
    with pytest.raises(DataError, match="no such file"):
        read_json(tmp_path / "none.json")
