"""Fuse, Sharded and Cached against double loops, and what they do when a part is slow, dead or swapped."""

import asyncio
import threading

import numpy as np
import pytest

from data.corpus import Corpus
from data.errors import (
    ConfigError,
    DataError,
    RetrieverError,
    RetrieverRefused,
    RetrieverTimeout,
    RetrieverUnavailable,
)
from data.jsonl import write_jsonl
from data.records import Hit, Passage
from retriever_server.retriever import Retriever
from retriever_server.retrievers.cache import Cached
from retriever_server.retrievers.fuse import Fuse
from retriever_server.retrievers.shard import Sharded
from tests.retriever_server.running import post


class Fixed(Retriever):
    """Always the same ranking, ids to scores; counts what it was asked."""

    def __init__(self, generation: str, scores: dict[str, float], failure: Exception | None = None) -> None:
        self.generation, self.scores, self.failure = generation, scores, failure
        self.asked: list[tuple] = []

    def search(self, queries, k, where=None):
        self.asked.append((list(queries), k, where))
        if self.failure:
            raise self.failure
        best = sorted(self.scores, key=lambda i: -self.scores[i])[:k]
        return [
            [Hit(Passage(i, f"text {i}"), self.scores[i], self.generation) for i in best] for _ in queries
        ]


class Stuck(Fixed):
    """Answers when `free` is set."""

    free = threading.Event()

    def search(self, queries, k, where=None):
        self.free.wait(60)
        return super().search(queries, k, where)


def found(retriever: Retriever, k: int = 10, where=None) -> list[tuple[str, float]]:
    [ranking] = retriever.search(["q"], k, where)
    return [(hit.passage.id, hit.score) for hit in ranking]


A = {"x": 9.0, "y": 5.0, "z": 1.0}
B = {"z": 0.9, "w": 0.5, "x": 0.1}


def test_reciprocal_rank_is_the_sum_over_ranks():
    expected = {"x": 1 / 61 + 1 / 63, "y": 1 / 62, "z": 1 / 63 + 1 / 61, "w": 1 / 62}
    ranking = found(Fuse([Fixed("a", A), Fixed("b", B)]))
    assert dict(ranking) == pytest.approx(expected)
    assert [i for i, _ in ranking] == ["x", "z", "y", "w"]  # ties in the order of the parts
    weighted = dict(found(Fuse([Fixed("a", A), Fixed("b", B)], weights=[2.0, 0.5], rrf_k=1)))
    assert weighted == pytest.approx({"x": 2 / 2 + 0.5 / 4, "y": 2 / 3, "z": 2 / 4 + 0.5 / 2, "w": 0.5 / 3})


def test_convex_sums_are_of_scores_on_one_scale():
    parts = [Fixed("a", A), Fixed("b", B)]
    min_max = dict(found(Fuse(parts, "convex", weights=[0.5, 0.5])))
    assert min_max == pytest.approx({"x": 0.5, "y": 0.25, "z": 0.5, "w": 0.25})
    z = {name: (np.array(list(s.values())) - np.mean(list(s.values()))) / np.std(list(s.values()))
         for name, s in (("a", A), ("b", B))}  # fmt: skip
    lowest = {name: scores.min() for name, scores in z.items()}
    by_id = {name: dict(zip(s, z[name], strict=True)) for name, s in (("a", A), ("b", B))}
    got = dict(found(Fuse(parts, "convex", normalize="z-score")))
    for i, score in got.items():  # up to what every passage gets alike
        expected = sum(by_id[name].get(i, lowest[name]) - lowest[name] for name in ("a", "b"))
        assert score == pytest.approx(expected)
    assert found(Fuse([Fixed("a", {"x": 3.0, "y": 3.0}), Fixed("none", {})], "convex"))[0] == ("x", 1.0)


def test_fuse_looks_deeper_than_it_answers_and_names_every_part():
    parts = [Fixed("a", A), Fixed("b", B)]
    fuse = Fuse(parts, depth=3)
    [ranking] = fuse.search(["q"], 1, {"year": 1999})
    assert [hit.passage.id for hit in ranking] == ["x"]
    assert all(part.asked == [(["q"], 3, {"year": 1999})] for part in parts)
    assert ranking[0].generation == fuse.generation and fuse.generation.endswith("(a+b)")
    assert fuse.generation != Fuse(parts, depth=3, weights=[1.0, 2.0]).generation
    assert fuse.search([], 3) == []


@pytest.mark.parametrize("text", ["another text", ""])
def test_ids_that_mean_different_passages_are_refused(text):
    class Foreign(Fixed):
        def search(self, queries, k, where=None):
            return [[Hit(Passage("x" if text else "", text), 1.0, "f")] for _ in queries]

    with pytest.raises(RetrieverError, match="is another passage in each part"):
        found(Fuse([Fixed("a", A), Foreign("f", {})]))


def test_shards_answer_as_one_index_would():
    scores = dict(zip("abcdefghijkl", np.random.default_rng(0).permutation(12).astype(float), strict=True))
    items = list(scores.items())
    shards = Sharded([Fixed(f"s{i}", dict(items[i::3])) for i in range(3)])
    assert found(shards, 5) == found(Fixed("whole", scores), 5)
    assert shards.search(["q"], 1)[0][0].generation == "sharded(s0+s1+s2)"


@pytest.mark.parametrize(
    ("bad", "error", "said"),
    [
        (Stuck("slow", A), RetrieverTimeout, r"part 2 of 2 \(slow\): no answer within 0.05 s"),
        (Fixed("dead", A, OSError("gone")), RetrieverUnavailable, r"part 2 of 2 \(dead\): OSError: gone"),
        (Fixed("late", A, RetrieverTimeout("late")), RetrieverTimeout, r"part 2 of 2 \(late\): late"),
    ],
)
def test_a_slow_or_dead_shard_is_an_error_or_is_named_never_missing_in_silence(bad, error, said, caplog):
    good = Fixed("good", B)
    # Long enough for the one that answers, however busy the machine is: `bad` is what may be late.
    seconds = 0.05 if isinstance(bad, Stuck) else 20.0
    with pytest.raises(error, match=said):
        found(Sharded([good, bad], seconds))
    partial = Sharded([good, bad], 2.0, allow_partial=True)
    [ranking] = partial.search(["q"], 3)
    assert [hit.passage.id for hit in ranking] == ["z", "w", "x"]
    assert {hit.generation for hit in ranking} == {"sharded(good+missing part 2)"}
    assert "answering without it: part 2 of 2" in caplog.text
    assert partial.describe()["partial_searches"] == 1
    with pytest.raises(error):
        found(Sharded([bad], 0.05, allow_partial=True))
    Stuck.free.set()
    Stuck.free = threading.Event()


def test_a_wrong_filter_is_the_callers_and_no_missing_shard():
    with pytest.raises(DataError, match="no filter"):
        found(Sharded([Fixed("a", A), Fixed("b", B, DataError("no filter"))], allow_partial=True))


def test_a_hanging_part_takes_a_bounded_number_of_threads(monkeypatch):
    monkeypatch.setattr("retriever_server.retrievers.side_by_side._IN_FLIGHT", 2)
    shards = Sharded([Stuck("slow", A), Fixed("good", B)], 0.01)
    for said in ("no answer", "no answer", "2 searches are under way already"):
        with pytest.raises(RetrieverTimeout if said == "no answer" else RetrieverUnavailable, match=said):
            found(shards)
    Stuck.free.set()
    Stuck.free = threading.Event()


def test_the_cache_asks_only_for_what_it_does_not_know():
    inner = Fixed("g1", A)
    cached = Cached(inner, size=2)
    first = cached.search(["a", "b", "a"], 2)
    assert inner.asked == [(["a", "b"], 2, None)]
    first[0].clear()  # a caller's list is its own
    assert cached.search(["a", "b"], 2)[0] == first[1]
    assert (cached.hits, cached.misses) == (2, 3)
    for k, where in ((3, None), (2, {"y": 1}), (2, {"y": 2})):
        cached.search(["a"], k, where)
        assert inner.asked[-1] == (["a"], k, where)
    asked = len(inner.asked)
    cached.search(["b"], 2)  # the least recently used have gone
    assert len(inner.asked) == asked + 1
    assert {"hits", "misses", "entries", "retriever"} <= set(cached.describe())
    assert cached.describe()["entries"] == 2


def test_the_cache_never_serves_or_mixes_another_generation():
    class Swapped(Fixed):
        swap_on = ""

        def search(self, queries, k, where=None):
            if self.swap_on in queries:
                self.generation = "g2"
            return super().search(queries, k, where)

    inner = Swapped("g1", A)
    cached = Cached(inner)
    cached.search(["a", "empty"], 2)
    inner.swap_on = "b"
    rankings = cached.search(["a", "b"], 2)  # "a" is known; the swap comes while "b" is asked for
    assert {hit.generation for ranking in rankings for hit in ranking} == {"g2"}
    cached.search(["a"], 2)
    assert inner.asked[-1][0] == ["a"]


def test_an_answer_with_a_part_missing_is_not_remembered():
    dead = Fixed("dead", A, OSError("gone"))
    cached = Cached(Sharded([Fixed("good", B), dead], allow_partial=True))
    assert len(found(cached)) == 3
    dead.failure = None
    assert dict(found(cached)).keys() == {"x", "y", "z", "w"}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Fuse([]), "parts: must be one or more"),
        (lambda: Fuse([Fixed("a", A)], weights=[1.0, 2.0]), "must be 1 numbers >= 0, one a part"),
        (lambda: Fuse([Fixed("a", A)], depth=0), "depth = 0"),
        (lambda: Sharded([Fixed("a", A)], 0), "deadline_seconds = 0: must be > 0"),
        (lambda: Cached(Fixed("a", A), 0), "size = 0: must be >= 1"),
    ],
)
def test_wrong_settings_are_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def with_corpus(folder, *ids) -> Fixed:
    write_jsonl(folder / f"{ids[0]}.jsonl", [{"id": i, "title": i, "text": f"text {i}"} for i in ids])
    part = Fixed("g", dict.fromkeys(ids, 1.0))
    part.corpus = Corpus(folder / f"{ids[0]}.jsonl")
    return part


def test_documents_and_pages_are_those_of_any_part(tmp_path):
    joined = Cached(Sharded([with_corpus(tmp_path, "a", "b"), Fixed("bare", {}), with_corpus(tmp_path, "c")]))
    found = [asyncio.run(joined.document(place)) for place in ("b", "c", "d")]
    assert [page and page.text for page in found] == ["text b", "text c", None]
    for whole in (False, True):
        body = {"urls": ["c", "d", "a"], "whole": whole}
        told = post(joined, "/access", body).json()["result"]
        assert [page and page["contents"] for page in told] == ['"c"\ntext c', None, '"a"\ntext a']
    with pytest.raises(RetrieverRefused, match="Fixed: no corpus"):
        asyncio.run(Sharded([Fixed("bare", {}), Fixed("too", {})]).document("a"))
