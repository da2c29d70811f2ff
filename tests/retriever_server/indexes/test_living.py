"""Passages added to and deleted from an index: equal to a rebuild, at every step, for every kind."""

import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.corpus import Corpus
from data.errors import ConfigError, DataError
from data.jsonl import write_json, write_jsonl
from data.records import Passage
from retriever_server.encoders.spec import EncodingSpec, Multi
from retriever_server.indexes import living
from retriever_server.indexes.ann import AnnIndex
from retriever_server.indexes.base import open_index, verify_index
from retriever_server.indexes.bm25 import BM25Index
from retriever_server.indexes.flat import FlatIndex
from retriever_server.indexes.generation import building
from retriever_server.indexes.inverted import InvertedIndex
from retriever_server.indexes.manifest import read_manifest
from retriever_server.indexes.maxsim import MaxSimIndex
from retriever_server.indexes.open_corpus import corpus_of
from retriever_server.indexes.postings import MaxScore
from tests.processes import Forked
from tests.retriever_server.tiny_encoders import FakeEncoder
from tests.samples import quick

KINDS = {"flat": FlatIndex, "ann": AnnIndex, "inverted": InvertedIndex, "maxsim": MaxSimIndex}
ALL = ("bm25", *KINDS)
FEW = ["river", "red", "blue", "fox", "sea", "city", "capital", "the"]


class WholeNumbers(FakeEncoder):
    """Vectors of small whole numbers: sums are exact in any order, and ties are frequent."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind, 8)
        self.spec = EncodingSpec("fake", kind, "whole", 8, similarity="dot")

    def encode(self, texts, role):
        vectors = super().encode(texts, role)
        if isinstance(vectors, Multi):
            return Multi(np.rint(vectors.values * 3), vectors.offsets)
        return np.rint(vectors * 3) if self.spec.kind == "dense" else (vectors / np.float32(0.7)).rint()


def encoder_of(kind: str) -> WholeNumbers | None:
    return WholeNumbers(KINDS[kind].vectors) if kind in KINDS else None


def build(kind: str, passages: list[Passage], folder: Path, encoder=None, dtype="float32", **options):
    rows = [{"id": p.id, "text": p.text, "metadata": dict(p.metadata)} for p in passages]
    write_jsonl(folder.with_suffix(".jsonl"), rows)
    corpus = Corpus(folder.with_suffix(".jsonl"))
    if kind == "bm25":
        return BM25Index.build(corpus, folder, **options)
    return KINDS[kind].build(corpus, folder, encoder or encoder_of(kind), dtype, **options)


def passages_of(rng: random.Random, ids: list[str]) -> list[Passage]:
    texts = (" ".join([*rng.choices(FEW, k=rng.randint(1, 6)), rng.choice(("fox", "sea"))]) for _ in ids)
    return [
        Passage(id_, text, metadata={"even": rng.random() < 0.5})
        for id_, text in zip(ids, texts, strict=True)
    ]


def some_options(rng: random.Random) -> dict:
    analyzer = rng.choice(["plain", "anserini"])
    return {"analyzer": analyzer, "b": rng.choice([0, 0.4, 1]), "k1": rng.choice([0, 0.9, 2])}


def found(index, queries, k, where=None) -> list[list[tuple[str, float]]]:
    rankings = index.search(queries, k, where)
    assert {hit.generation for hits in rankings for hit in hits} <= {index.generation}
    return [[(hit.passage.id, hit.score) for hit in hits] for hits in rankings]


def assert_equal(index, rebuilt, rng: random.Random, scores: bool = True) -> None:
    queries = [" ".join(rng.choices(FEW, k=rng.randint(1, 4))) for _ in range(4)]
    whole = len(rebuilt.corpus)
    for where in (None, {"even": True}):
        expected = found(rebuilt, queries, whole, where)
        assert found(index, queries, whole, where) == expected  # every passage, score and tie
        top = found(index, queries, 3, where)
        assert [[score for _, score in hits] for hits in top] == [
            [s for _, s in hits[:3]] for hits in expected
        ]
        if index.kind in ("bm25", "inverted"):
            assert top == [hits[:3] for hits in expected]
    assert [p.id for p in index.corpus] == [p.id for p in rebuilt.corpus]
    assert len(index.corpus) == index.manifest.corpus_count == index.describe()["passages"]
    asked = [[*rebuilt.corpus][:5], [Passage("nobody", "sea")]]
    assert index.score(queries[:2], asked) == rebuilt.score(queries[:2], asked)


@pytest.mark.parametrize("kind", quick(["bm25", "flat"], ALL))
@settings(
    max_examples=settings.default.max_examples * 3 // 20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(seed=st.integers(0, 10**6), exhaustive=st.booleans())
def test_any_changes_equal_a_rebuild(kind, tmp_path, seed, exhaustive):
    rng, encoder = random.Random(seed), encoder_of(kind)
    folder = tmp_path / f"{seed}-{exhaustive}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if not exhaustive:
        MaxScore.__init__.__defaults__ = (0, 0)
    try:
        kept = passages_of(rng, [str(i) for i in range(rng.randint(3, 12))])
        options = {} if encoder else some_options(rng)
        build(kind, kept, folder / "index", encoder, **options)
        seen = {p.id for p in kept}
        for step in range(5):
            change = rng.choice(["add", "add", "delete", "replace", "compact", "merge"])
            if change == "add":
                new = passages_of(rng, [f"{step}.{i}" for i in range(rng.randint(1, 4))])
                living.add(folder / "index", new, encoder)
                kept = kept + new
            elif change == "delete" and len(kept) > 2:
                gone = {p.id for p in rng.sample(kept, rng.randint(1, len(kept) // 2))}
                living.delete(folder / "index", sorted(gone))
                kept = [p for p in kept if p.id not in gone]
            elif change == "replace":
                new = passages_of(rng, [rng.choice(kept).id, f"{step}.new"])
                living.add(folder / "index", new, encoder, replaces=True)
                kept = [p for p in kept if p.id != new[0].id] + new
            elif change in ("compact", "merge"):
                first = change == "merge" and len(read_manifest(folder / "index").parts) > 1
                living.compact(folder / "index", int(first))
            index = open_index(folder / "index", **({"encoder": encoder} if encoder else {}))
            left = {p.id for p in kept}
            seen |= left
            gone = sorted(seen - left)
            assert (index.corpus.positions(gone) == -1).all() and not any(map(index.corpus.get, gone))
            assert index.corpus.positions([p.id for p in kept]).tolist() == list(range(len(kept)))
            rebuilt = build(kind, kept, folder / f"rebuilt-{step}", encoder, **options)
            assert_equal(index, rebuilt, rng)
            verify_index(folder / "index")
    finally:
        MaxScore.__init__.__defaults__ = (30_000, 0)


@pytest.mark.parametrize("kind", ALL)
def test_compacted_it_has_the_files_of_a_rebuild(kind, tmp_path):
    rng, encoder = random.Random(1), encoder_of(kind)
    kept = passages_of(rng, [str(i) for i in range(60)])
    index = build(kind, kept[:40], tmp_path / "index", encoder)
    index = index.add(kept[40:]).delete([p.id for p in kept[::3]])
    living.compact(index.path)
    [part] = index.reopened().manifest.parts
    files = read_manifest(index.path / part).checksums
    rebuilt = BM25Index if kind == "bm25" else KINDS[kind]
    corpus = Corpus(index.path / f"{part}.jsonl")
    options = [] if kind == "bm25" else [encoder, "float32"]
    built = rebuilt.build(corpus, tmp_path / "rebuilt", *options).manifest.checksums
    assert {**built, "corpus.offsets": ""} == {**files, "corpus.offsets": ""}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_smaller_types_equal_a_rebuild(kind, dtype, tmp_path):
    rng, encoder = random.Random(2), FakeEncoder(KINDS[kind].vectors)
    kept = passages_of(rng, [str(i) for i in range(80)])
    index = build(kind, kept[:50], tmp_path / "index", encoder, dtype)
    index = index.add(kept[50:60]).add(kept[60:]).delete([p.id for p in kept[::4]])
    left = [p for i, p in enumerate(kept) if i % 4]
    rebuilt = build(kind, left, tmp_path / "rebuilt", encoder, dtype)
    tolerance = 0.02 if (kind, dtype) == ("inverted", "int8") else 1e-6
    living.compact(index.path)
    for each in (index, index.reopened()):
        for ours, theirs in zip(found(each, FEW, 60), found(rebuilt, FEW, 60), strict=True):
            assert dict(ours) == pytest.approx(dict(theirs), abs=tolerance)


def test_one_passage_added_encodes_one(tmp_path):
    encoder = FakeEncoder()
    index = build(
        "flat", passages_of(random.Random(3), [str(i) for i in range(300)]), tmp_path / "i", encoder
    )
    before = encoder.encoded
    index = index.add([Passage("new", "north")]).delete(["7"])
    living.compact(index.path)
    index = index.reopened()
    assert encoder.encoded == before + 1
    assert index.search(["north"], 1)[0][0].passage.id == "new"


def test_wrong_changes_are_refused_and_change_nothing(tmp_path):
    index = build("flat", passages_of(random.Random(4), ["1", "2"]), tmp_path / "i", FakeEncoder())
    before = index.generation
    other = FakeEncoder(seed=1)
    with pytest.raises(DataError, match="built with another encoder"):
        living.add(index.path, [Passage("3", "sea")], other)
    with pytest.raises(DataError, match="has a passage '2' already"):
        index.add([Passage("3", "sea"), Passage("2", "sea")])
    with pytest.raises(DataError, match="i: two of the new passages have the id '3'; nothing"):
        index.add([Passage("3", "sea"), Passage("3", "sea")])
    with pytest.raises(DataError, match="i: no passages to add"):
        index.add([])
    with pytest.raises(DataError, match="has no passage '4'; nothing was deleted"):
        index.delete(["1", "4"])
    with pytest.raises(DataError, match="all of its 2 passages"):
        index.delete(["1", "2"])
    with pytest.raises(ConfigError, match="no such folder"):
        living.delete(tmp_path / "nowhere", ["1"])
    assert living.compact(index.path, 7).generation == before  # another one merged the parts meanwhile
    assert index.reopened().generation == before
    words = build("bm25", passages_of(random.Random(5), ["1", "2"]), tmp_path / "b")
    with pytest.raises(DataError, match="kind bm25 takes no encoder"):
        living.add(words.path, [Passage("3", "sea")], other)
    cosine = build("bm25", passages_of(random.Random(5), ["1", "2"]), tmp_path / "t", scoring="tfidf")
    with pytest.raises(ConfigError, match="scored by tfidf"):
        cosine.add([Passage("3", "sea")])


def test_an_index_without_lengths_and_passages_without_words_change_like_any_other(tmp_path):
    kept = passages_of(random.Random(6), [str(i) for i in range(9)])
    index = build("bm25", kept, tmp_path / "index")
    manifest = read_manifest(index.path)
    files = {name: size for name, size in manifest.files.items() if name != "lengths.npy"}
    (index.path / "lengths.npy").unlink()  # as versions before this one built it
    old = replace(manifest, files=files)
    write_json(index.path / "manifest.json", replace(old, checksum=old.own_hash).as_record())
    added = [Passage("none", "..."), Passage("other", "...")]
    index = open_index(index.path).add(added)
    assert_equal(index, build("bm25", [*kept, *added], tmp_path / "rebuilt"), random.Random(6))
    living.compact(index.path, 1) if len(index.delete(["none"]).manifest.parts) > 1 else None
    assert_equal(index.reopened(), build("bm25", [*kept, added[1]], tmp_path / "again"), random.Random(6))


@pytest.mark.slow
def test_many_small_changes_are_merged_now_and_then_and_large_parts_seldom(tmp_path):
    kept = passages_of(random.Random(7), [str(i) for i in range(90)])
    index, largest, first = build("bm25", kept[:50], tmp_path / "index"), 0, set()
    for passage in kept[50:]:
        index = index.add([passage]).compact()
        largest = max(largest, len(index.manifest.parts))
        first.add(next(iter(index.manifest.parts)))
    assert largest <= living.MOST_PARTS and len(first) <= 4
    index = index.delete([p.id for p in kept[:30]]).compact()
    assert len(index.manifest.parts) == 1
    assert_equal(index, build("bm25", kept[30:], tmp_path / "rebuilt"), random.Random(7))


def test_parts_of_which_nothing_is_left_go_and_the_folder_can_be_moved(tmp_path):
    kept = passages_of(random.Random(8), [str(i) for i in range(6)])
    index = build("bm25", kept[:4], tmp_path / "index").add(kept[4:]).delete(["4", "5"])
    assert list(living.compact(index.path, 1).parts) == ["."]
    index = index.reopened().add(kept[4:]).delete(["0"])
    (tmp_path / "to").mkdir()
    for name in ("index", "index.jsonl"):
        (tmp_path / name).rename(tmp_path / "to" / name)
    verify_index(tmp_path / "to" / "index")
    rebuilt = build("bm25", kept[1:], tmp_path / "rebuilt")
    assert_equal(open_index(tmp_path / "to" / "index"), rebuilt, random.Random(8))


def test_a_change_waits_for_another_and_names_it_in_the_end(tmp_path, monkeypatch):
    index = build("bm25", passages_of(random.Random(9), ["1", "2"]), tmp_path / "index")
    one, two = (Forked(living.add, index.path, [Passage(id_, "fox")]) for id_ in "ab")
    assert one.wait(timeout=30) == two.wait(timeout=30) == 0
    assert sorted(read_ids(index.path)) == ["1", "2", "a", "b"]
    monkeypatch.setattr(living, "PATIENCE_SECONDS", 0.1)
    with building(index.path), pytest.raises(ConfigError, match="being built there by process"):
        living.delete(index.path, ["1"])


def grow(folder: Path) -> None:
    for number in range(1, 20):
        living.add(folder, [Passage(str(number), "fox")])
        if number % 6 == 0:
            living.compact(folder, number % 12 // 6)


@pytest.mark.slow
def test_searches_meanwhile_see_one_generation_each(tmp_path):
    index = build("bm25", [Passage("0", "fox")], tmp_path / "index")
    process, seen = Forked(grow, index.path), {index.generation}
    while process.poll() is None:
        index = open_index(index.path)
        hits = index.search(["fox"], 100)[0]
        assert [hit.passage.id for hit in hits] == [str(i) for i in range(len(index.corpus))]
        seen.add(index.generation)
    assert process.wait(timeout=20) == 0 and len(seen) > 3


def change_on_and_on(folder: Path, encoder: FakeEncoder | None) -> None:
    number = len(read_ids(folder))
    while True:
        living.add(folder, [Passage(str(number), f"fox w{number}")], encoder)
        number += 1
        if number % 5 == 0:
            living.delete(folder, [str(number - 1)])
            living.add(folder, [Passage(str(number - 1), f"fox w{number - 1}")], encoder)
        if number % 7 == 0:
            living.compact(folder, number % 2)


def read_ids(folder: Path) -> list[str]:
    return [passage.id for passage in corpus_of(folder)]


@pytest.mark.parametrize(("kind", "kills"), quick([("bm25", 2)], [("bm25", 2), ("bm25", 60), ("flat", 60)]))
def test_killed_at_any_moment_the_old_or_the_new_generation_is_there(tmp_path, kind, kills):
    folder, encoder = tmp_path / "index", None if kind == "bm25" else FakeEncoder()
    build(kind, [Passage(str(i), f"fox w{i}") for i in range(4)], folder, encoder)
    rng = random.Random(kills)
    for _ in range(kills):
        before, process = read_manifest(folder).generation, Forked(change_on_and_on, folder, encoder)
        end = time.monotonic() + 60
        while read_manifest(folder).generation == before and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=20)
        verify_index(folder)
        index = open_index(folder, **({"encoder": encoder} if encoder else {}))
        ids = read_ids(folder)
        assert sorted(ids, key=int) in ([str(i) for i in range(n)] for n in (len(ids), len(ids) + 1))
        hits = index.search([f"fox w{id_}" for id_ in ids], 1)
        assert [hit.passage.id for [hit] in hits] == ids
    (folder / ".manifest.json.7-ab.tmp").touch()  # as one that is killed while it writes leaves it
    living.add(folder, [Passage("last", "fox")], encoder)
    assert not list(folder.glob(".*"))


def test_scores_of_ann_are_those_of_a_rebuild_to_the_last_bit(tmp_path):
    rng, encoder = random.Random(0), FakeEncoder("dense", 48)
    passages = passages_of(rng, [str(i) for i in range(90)])
    build("ann", passages[:50], tmp_path / "index", encoder)
    living.add(tmp_path / "index", passages[50:], encoder)
    rebuilt = build("ann", passages, tmp_path / "rebuilt", encoder)
    queries = [" ".join(rng.choices(FEW, k=3)) for _ in range(20)]
    assert found(open_index(tmp_path / "index", encoder=encoder), queries, 10) == found(rebuilt, queries, 10)


def test_ann_finds_what_is_left_where_most_of_the_near_passages_were_deleted(tmp_path):
    encoder = FakeEncoder()
    passages = [Passage(str(i), "sea") for i in range(200)] + [Passage("left", "sea north")]
    build("ann", passages, tmp_path / "index", encoder, factory="Flat")
    living.delete(tmp_path / "index", [str(i) for i in range(200)])
    living.add(tmp_path / "index", [Passage("new", "fox"), Passage("newer", "fox")], encoder)
    hits = open_index(tmp_path / "index", encoder=encoder).search(["sea"], 2)[0]
    assert [hit.passage.id for hit in hits] == ["left", "new"]
