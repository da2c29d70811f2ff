"""The memory-mapped corpus: what a line may be, how a wrong one is named, when its table is made anew."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import data.corpus
import data.offsets
from data.corpus import Corpus
from data.errors import CorpusChanged, DataError
from data.formats.rows import parse_passage
from data.records import Passage

SHARED = Path(__file__).parents[3] / "shared" / "data"
PASSAGES = [Passage(f"p{i}", f"Text {i}\nwith é.", f"Title {i}" if i % 2 else "") for i in range(50)]


def write_corpus(path, passages=PASSAGES):
    lines = [json.dumps({"id": p.id, "title": p.title, "text": p.text}) for p in passages]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("record", "title", "text"),
    [
        ({"contents": '"Rome"\nA city.\nOld.'}, "Rome", "A city.\nOld."),
        ({"contents": 'Rome\nA "city".'}, "Rome", 'A "city".'),
        ({"contents": '"The "Best" of"\nA record.'}, 'The "Best" of', "A record."),
        ({"contents": "one line only"}, "", "one line only"),
        ({"contents": '""\nuntitled'}, "", "untitled"),
        ({"title": "Rome", "contents": '"Rome"\nA city.'}, "Rome", "A city."),
        ({"title": "Rome", "contents": "A city.\nOld."}, "Rome", "A city.\nOld."),
        ({"title": "", "contents": "A city.\nOld."}, "", "A city.\nOld."),
        ({"title": "Rome", "text": "A city."}, "Rome", "A city."),
        ({"title": None, "text": " A city. "}, "", "A city."),
        ({"title": "Rome", "text": "A city.", "contents": "other\nthings"}, "Rome", "A city."),
    ],
)
def test_each_layout_gives_title_and_text(record, title, text):
    assert parse_passage({"id": 7, **record}) == Passage("7", text, title)


def test_contents_of_a_passage_parse_back_to_it():
    for passage in PASSAGES[1::2]:
        assert parse_passage({"id": passage.id, "contents": passage.contents}) == passage


def test_passages_come_by_position_id_and_in_order(tmp_path):
    corpus = Corpus(write_corpus(tmp_path / "corpus.jsonl"))
    assert len(corpus) == 50
    assert list(corpus) == PASSAGES
    assert corpus[np.int32(7)] == PASSAGES[7]
    assert [corpus.get(p.id) for p in PASSAGES] == PASSAGES
    assert corpus.get("p50") is None


@pytest.mark.parametrize("position", [-1, 50])
def test_position_outside_is_refused_not_wrapped(tmp_path, position):
    with pytest.raises(IndexError, match="of 50"):
        Corpus(write_corpus(tmp_path / "corpus.jsonl"))[position]


@pytest.mark.parametrize("name", ["_id", "docid"])
def test_the_id_may_have_the_name_that_beir_or_tevatron_gives_it(tmp_path, name):
    (tmp_path / "c.jsonl").write_text(json.dumps({name: 7, "title": "Rome", "text": "A city."}) + "\n")
    assert list(Corpus(tmp_path / "c.jsonl")) == [Passage("7", "A city.", "Rome")]


def test_blank_lines_a_mark_and_no_last_newline_change_nothing(tmp_path):
    path = write_corpus(tmp_path / "corpus.jsonl")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\n").rstrip())
    assert list(Corpus(path)) == PASSAGES


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ('{"id": "x"', "not valid JSON"),
        ('"x"', "expected an object"),
        ('{"contents": "a\\nb"}', 'no "id"'),
        ('{"id": "", "text": "a"}', 'no "id"'),
        ('{"id": true, "text": "a"}', '"id" must be a string, found true'),
        ('{"id": "x"}', 'neither "contents" nor "text"'),
        ('{"id": "x", "txet": "a"}', 'neither "contents" nor "text" nor "image"; there are id, txet'),
        ('{"id": "x", "text": 3}', '"text" must be a string, found 3'),
        ('{"id": "x", "contents": ["a"]}', '"contents" must be a string'),
        ('{"id": "p0", "text": "again"}', "id 'p0' stands on line 2 already"),
    ],
)
def test_wrong_line_is_named(tmp_path, line, wrong):
    path = write_corpus(tmp_path / "corpus.jsonl", PASSAGES[:2])
    path.write_text(f"\n{path.read_text()}{line}\n")
    with pytest.raises(DataError) as caught:
        Corpus(path)
    assert f"corpus.jsonl:4: {wrong}" in str(caught.value)
    assert os.listdir(tmp_path) == ["corpus.jsonl"]


@pytest.mark.parametrize("text", ['{"version": "1.1", "data": []}', '{\n"data": []}', "# A document"])
def test_what_another_command_makes_a_corpus_of_is_said_so(tmp_path, text):
    for name, said in {"set.json": True, "page.md": True, "corpus.jsonl": False}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError) as caught:
            Corpus(tmp_path / name)
        assert (f"`sleuth corpus --source {tmp_path / name} --out" in str(caught.value)) == said


def test_passages_without_text_are_counted_and_kept(tmp_path, caplog):
    """As in Cranfield: they find nothing, and judgements may name them."""
    (tmp_path / "corpus.jsonl").write_text(
        '{"id": "a", "text": "x"}\n{"id": "b", "contents": "\\"T\\"\\n"}\n'
    )
    assert [(p.title, p.text) for p in Corpus(tmp_path / "corpus.jsonl")] == [("", "x"), ("T", "")]
    assert "corpus.jsonl: 1 passage without text, the first on line 2" in caplog.text


def test_file_that_cannot_be_a_corpus_is_said(tmp_path):
    for name, content, wrong in (
        ("none.jsonl", None, "no such file"),
        ("none.jsonl.gz", None, "no such file"),
        ("empty.jsonl", b"", "holds no passages"),
        ("blank.jsonl", b"\n \n", "holds no passages"),
        ("a.jsonl.gz", b"\x1f\x8b", "gunzip it first"),
        (".", None, "is a folder"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=wrong):
            Corpus(tmp_path / name)


def test_content_hash_is_sha256_of_the_bytes_first_time_and_later(tmp_path):
    path = write_corpus(tmp_path / "corpus.jsonl")
    expected = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert [Corpus(path).content_hash for _ in range(2)] == [expected, expected]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder of the user's cache, in which the table of every corpus is kept here, however small."""
    monkeypatch.setattr(data.offsets, "_WORTH_CACHING_BYTES", 1)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    return tmp_path / "home" / ".cache" / "sleuth" / "corpora"


def test_second_opening_reads_the_kept_table_and_not_the_lines(tmp_path, kept, monkeypatch):
    path = write_corpus(tmp_path / "corpus.jsonl")
    Corpus(path)
    monkeypatch.setattr(data.corpus, "_read_all", None)
    again = Corpus(path)
    assert list(again) == PASSAGES
    assert again.get("p33") == PASSAGES[33]


def test_changed_corpus_gets_a_new_table_though_its_size_is_the_same(tmp_path, kept):
    path = write_corpus(tmp_path / "corpus.jsonl")
    old = Corpus(path).content_hash
    changed = path.read_text().replace("p33", "q33")
    path.write_text(changed)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    corpus = Corpus(path)
    assert corpus.get("p33") is None
    assert corpus.get("q33") == corpus[33]
    assert corpus.content_hash != old


@pytest.mark.parametrize("damage", [b"", b"nonsense", b"n" * 48, "half", "flipped"])
def test_damaged_table_is_made_anew(tmp_path, kept, damage):
    path = write_corpus(tmp_path / "corpus.jsonl")
    Corpus(path)
    [table] = kept.iterdir()
    whole = table.read_bytes()
    for at in range(0, len(whole), 97) if damage == "flipped" else [0]:
        cut = whole[: len(whole) // 2]
        table.write_bytes({"half": cut, "flipped": flip(whole, at)}.get(damage, damage))  # type: ignore[arg-type]
        assert list(Corpus(path)) == PASSAGES
        assert table.read_bytes() == whole


def flip(content: bytes, at: int) -> bytes:
    """The content with one bit of the byte at `at` flipped."""
    return content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]


def test_a_table_is_kept_in_the_cache_and_never_beside_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(data.offsets, "_WORTH_CACHING_BYTES", 1)
    (tmp_path / "shared").mkdir()
    path = write_corpus(tmp_path / "shared/corpus.jsonl")
    (tmp_path / "shared").chmod(0o555)
    home = tmp_path / "home"
    monkeypatch.setattr(Path, "home", lambda: home)
    assert list(Corpus(path)) == PASSAGES
    assert os.listdir(tmp_path / "shared") == ["corpus.jsonl"]
    assert len(list((home / ".cache/sleuth/corpora").iterdir())) == 1
    home = path  # a home in which no folder can be made: it stays in memory
    assert list(Corpus(path)) == PASSAGES


def test_what_the_first_version_put_beside_a_corpus_changes_nothing(tmp_path):
    path = write_corpus(tmp_path / "corpus.jsonl")
    (tmp_path / "corpus.jsonl.offsets.npy").write_bytes(b"old")
    assert list(Corpus(path)) == PASSAGES
    assert (tmp_path / "corpus.jsonl.offsets.npy").read_bytes() == b"old"


@pytest.mark.parametrize("change", ["in place", "shorter", "flipped", "back in time"])
def test_a_corpus_rewritten_under_its_reader_gives_an_error_and_no_other_text(tmp_path, change):
    path = write_corpus(tmp_path / "corpus.jsonl")
    corpus, whole, times = Corpus(path), path.read_bytes(), path.stat()
    with open(path, "wb") as file:  # the same inode
        new = {"in place": whole[::-1], "shorter": whole[:300], "flipped": flip(whole, len(whole) - 9)}
        file.write(new.get(change, whole.replace(b"Text", b"Tixt")))
    if change == "back in time":
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(CorpusChanged, match=r"^corpus.jsonl: passage 49 is not what was indexed"):
        corpus[49]
    read = 0
    for position, passage in enumerate(PASSAGES):
        with suppress(CorpusChanged):
            assert corpus[position] == passage
            read += 1
    assert read == {"shorter": 4, "flipped": 49}.get(change, 0)


def test_a_corpus_replaced_by_another_file_is_read_on(tmp_path):
    corpus = Corpus(write_corpus(tmp_path / "corpus.jsonl"))
    write_corpus(tmp_path / "new", PASSAGES[:3])
    os.replace(tmp_path / "new", tmp_path / "corpus.jsonl")
    assert list(corpus) == PASSAGES


def test_ids_of_the_same_hash_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(data.corpus, "hash_text", lambda passage_id: len(passage_id))
    corpus = Corpus(write_corpus(tmp_path / "corpus.jsonl"))
    assert [corpus.get(p.id) for p in PASSAGES] == PASSAGES
    assert corpus.get("zz") is None


def test_threads_read_the_same_passages(tmp_path):
    corpus = Corpus(write_corpus(tmp_path / "corpus.jsonl"))
    positions = list(range(50)) * 40
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(corpus.__getitem__, positions)) == [PASSAGES[i] for i in positions]


@pytest.mark.parametrize(("name", "count"), [("squad", 4511), ("hotpotqa", 4937)])
def test_real_corpus_opens_whole(tmp_path, name, count):
    path = SHARED / name / "corpus.jsonl"
    if not path.exists():
        pytest.skip("shared data is absent")
    corpus = Corpus(path)
    assert len(corpus) == count
    for position in (0, count // 2, count - 1):
        passage = corpus[position]
        assert corpus.get(passage.id) == passage
    lines = path.read_bytes().splitlines()
    assert all(p.contents == json.loads(line)["contents"] for p, line in zip(corpus, lines, strict=True))
