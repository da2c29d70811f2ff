"""Generations on disk: written whole or not at all, opened only with what made them."""

import fcntl
import json
import os
import re
import shutil
import socket
import threading
from pathlib import Path

import pytest

from data.corpus import Corpus
from data.errors import ConfigError, DataError, StorageError
from data.jsonl import write_jsonl
from retriever_server.indexes import bm25
from retriever_server.indexes.base import open_index, verify_index
from retriever_server.indexes.bm25 import BM25Index
from retriever_server.indexes.flat import FlatIndex
from retriever_server.indexes.generation import building
from retriever_server.indexes.manifest import MANIFEST
from tests.retriever_server.tiny_encoders import FakeEncoder


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    return make_corpus(tmp_path / "corpus.jsonl", "red fox", "blue sea")


def make_corpus(path: Path, *texts: str) -> Corpus:
    write_jsonl(path, [{"id": str(i), "title": "", "text": t} for i, t in enumerate(texts)])
    return Corpus(path)


def change_manifest(folder: Path, **fields) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **fields}))


def test_same_corpus_and_settings_are_reused(tmp_path, corpus):
    first = BM25Index.build(corpus, tmp_path / "index")
    written = (tmp_path / "index" / MANIFEST).stat().st_ino
    second = BM25Index.build(corpus, tmp_path / "index")
    assert second.generation == first.generation
    assert (tmp_path / "index" / MANIFEST).stat().st_ino == written


def test_the_generation_names_corpus_and_settings(tmp_path, corpus):
    other = make_corpus(tmp_path / "other.jsonl", "red fox", "green sea")
    (tmp_path / "elsewhere").mkdir()
    same = make_corpus(tmp_path / "elsewhere/corpus.jsonl", "red fox", "blue sea")
    index, settings, changed, copied = (
        BM25Index.build(c, tmp_path / name, k1=k1)
        for name, c, k1 in (("a", corpus, 1), ("b", corpus, 2), ("c", other, 1), ("d", same, 1))
    )
    assert len({index.generation, settings.generation, changed.generation}) == 3
    assert copied.generation == index.generation


def test_a_different_index_is_replaced_only_when_told(tmp_path, corpus):
    old = BM25Index.build(corpus, tmp_path / "index")
    with pytest.raises(ConfigError, match=f"holds the index {old.generation}.*--overwrite"):
        BM25Index.build(corpus, tmp_path / "index", k1=2)
    new = BM25Index.build(corpus, tmp_path / "index", k1=2, overwrite=True)
    assert open_index(tmp_path / "index").generation == new.generation != old.generation
    assert old.search(["fox"], 1)[0][0].generation == old.generation  # it was open, it still reads
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"index"}


def test_a_folder_that_is_no_index_is_never_replaced(tmp_path, corpus):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(ConfigError, match="exists and is no index"):
        BM25Index.build(corpus, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine/notes.txt").read_text() == "keep"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_build_leaves_its_counts_and_goes_on(tmp_path, corpus, monkeypatch, error):
    def fail(*_) -> None:
        raise error

    expected = KeyboardInterrupt if error is KeyboardInterrupt else StorageError
    with monkeypatch.context() as patch, pytest.raises(expected):
        patch.setattr(bm25, "write_postings", fail)
        BM25Index.build(corpus, tmp_path / "index")
    assert [p.name.partition("-")[0] for p in tmp_path.iterdir() if p.is_dir()] == [".index.counting"]
    counted: list[int] = []
    BM25Index.build(corpus, tmp_path / "index", progress=lambda _, total: counted.append(total) or [])
    assert counted == [0]
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["index"]


def test_index_and_corpus_can_be_moved_together(tmp_path):
    (tmp_path / "run").mkdir()
    corpus = make_corpus(tmp_path / "run/corpus.jsonl", "red fox")
    generation = BM25Index.build(corpus, tmp_path / "run/index").generation
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert open_index(tmp_path / "moved/index").generation == generation


def test_what_is_no_index_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        open_index(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"manifest.json is missing"):
        open_index(tmp_path)
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(DataError, match="not the manifest of an index"):
        open_index(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(DataError, match=r"manifest.json:1: not valid JSON"):
        open_index(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format_version": 99}, "format 99 is newer than this program's 1"),
        ({"kind": "hnsw"}, "kind 'hnsw' is unknown; known: bm25"),
    ],
)
def test_an_index_of_the_future_is_refused(tmp_path, corpus, fields, message):
    BM25Index.build(corpus, tmp_path / "index")
    change_manifest(tmp_path / "index", **fields)
    with pytest.raises(DataError, match=message):
        open_index(tmp_path / "index")


def test_a_changed_corpus_is_refused_with_the_difference(tmp_path, corpus):
    BM25Index.build(corpus, tmp_path / "index")
    make_corpus(tmp_path / "corpus.jsonl", "red fox", "blue sea", "more")
    with pytest.raises(DataError, match=r"changed since .* bytes, now .*index it again"):
        open_index(tmp_path / "index")
    make_corpus(tmp_path / "corpus.jsonl", "red fox", "blue sky")  # the same size
    with pytest.raises(DataError, match=r"changed since .*hash .*, now .*index it again"):
        open_index(tmp_path / "index")
    (tmp_path / "corpus.jsonl").unlink()
    with pytest.raises(DataError, match=r"its corpus .* is missing"):
        open_index(tmp_path / "index")


def test_a_damaged_index_is_refused(tmp_path, corpus):
    BM25Index.build(corpus, tmp_path / "index")
    weights = next((tmp_path / "index").glob("weights.npy"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"missing or not \d+ bytes"):
        open_index(tmp_path / "index")
    weights.unlink()
    with pytest.raises(DataError, match="missing or not"):
        open_index(tmp_path / "index")


def build_beside(tmp_path: Path, corpus: Corpus, *builds) -> None:
    """Each of the builds, while a builder of the whole index is at work at the same place."""

    def progress(passages, _):
        for build in builds:
            with pytest.raises(ConfigError, match=HELD):
                build()
        return passages

    BM25Index.build(corpus, tmp_path / "index", progress=progress)


HELD = (
    rf"index: an index is being built there by process {os.getpid()} on {re.escape(socket.gethostname())} \("
)


def test_a_second_builder_is_refused_with_the_name_of_the_first(tmp_path, corpus):
    other = make_corpus(tmp_path / "other.jsonl", "green sea")

    def build() -> None:
        BM25Index.build(other, tmp_path / "index", overwrite=True)

    def encode() -> None:
        FlatIndex.build(other, tmp_path / "index", FakeEncoder(), overwrite=True)

    def encode_part() -> None:
        with building(tmp_path / "index", "1-of-2"):
            pass

    build_beside(tmp_path, corpus, build, encode, encode_part)
    assert verify_index(tmp_path / "index").corpus_hash == corpus.content_hash
    build()
    assert verify_index(tmp_path / "index").corpus_hash == other.content_hash
    assert list(tmp_path.glob(".*")) == []


def test_parts_are_built_side_by_side_but_neither_the_same_nor_the_whole(tmp_path):
    with building(tmp_path / "index", "1-of-2"), building(tmp_path / "index", "2-of-2"):
        for part in ("", "1-of-2"):
            with pytest.raises(ConfigError, match=HELD), building(tmp_path / "index", part):
                pass
    assert list(tmp_path.glob(".*")) == []


def test_a_lock_removed_while_it_is_waited_for_locks_nothing(tmp_path, monkeypatch):
    """Its last holder unlinks it between another's opening it and locking it."""
    flock, unlinked = fcntl.flock, []

    def unlink_first(file, flags) -> None:
        if not unlinked:
            unlinked.append((tmp_path / ".index.lock").unlink())
        flock(file, flags)

    monkeypatch.setattr(fcntl, "flock", unlink_first)
    with building(tmp_path / "index"):
        assert (tmp_path / ".index.lock").read_text().startswith(f"{os.getpid()} on ")


def test_a_holder_that_has_just_begun_is_named_too(tmp_path):
    path = tmp_path / ".index.lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        begin = threading.Timer(0.2, path.write_text, ["7 on a (b)"])
        begin.start()
        with pytest.raises(ConfigError, match=r"by process 7 on a \(b\)$"), building(tmp_path / "index"):
            pass
    begin.join()


def test_an_index_that_is_there_is_taken_from_a_folder_without_the_right_to_write(tmp_path, corpus):
    made = BM25Index.build(corpus, tmp_path / "shared/index").generation
    before = sorted(tmp_path.rglob("*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retriever_server.indexes.generation.locked", None)
        assert BM25Index.build(corpus, tmp_path / "shared/index").generation == made
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("move", [shutil.copytree, shutil.move])
def test_an_index_keeps_the_table_of_its_corpus_also_when_both_are_copied(tmp_path, monkeypatch, move):
    (tmp_path / "run").mkdir()
    corpus = make_corpus(tmp_path / "run/corpus.jsonl", "red fox")
    BM25Index.build(corpus, tmp_path / "run/index")
    move(tmp_path / "run", tmp_path / "copy")
    os.utime(tmp_path / "copy/corpus.jsonl", ns=(7, 7))
    monkeypatch.setattr("data.corpus._read_all", None)
    index = open_index(tmp_path / "copy/index")
    assert index.search(["fox"], 1)[0][0].passage.text == "red fox"
    assert sorted(os.listdir(tmp_path / "copy")) == ["corpus.jsonl", "index"]
