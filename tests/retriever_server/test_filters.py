"""Metadata filters: what they allow, what they refuse, and that the best k are taken among the allowed."""

import asyncio
import json
import math
import operator
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data.columns
import data.offsets
import retriever_server.filters as filters
from data.columns import METADATA
from data.corpus import Corpus
from data.errors import DataError
from data.jsonl import write_jsonl
from retriever_server.filters import allowed
from retriever_server.indexes.bm25 import BM25Index
from retriever_server.retrievers.baselines import RandomPassages
from retriever_server.server.app import create_app
from retriever_server.server.backends import HotSwappable

ROWS = [
    {"year": 1999, "lang": "de"},
    {"year": 2001, "lang": ["de", "fr"]},
    {"year": "1999"},
    {"year": True},
    {},
]


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    rows = [{"id": str(i), "text": f"fox {'fox ' * i}", "metadata": m} for i, m in enumerate(ROWS)]
    del rows[4]["metadata"]
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    return Corpus(tmp_path / "corpus.jsonl")


@pytest.mark.parametrize(
    ("where", "positions"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"year": 1999}, [0]),
        ({"year": 1999.0}, [0]),
        ({"year": "1999"}, [2]),
        ({"year": True}, [3]),
        ({"year": 1}, []),
        ({"year": {"in": [2001, "1999"]}}, [1, 2]),
        ({"year": {"in": []}}, []),
        ({"year": {"gte": 1999, "lt": 2001}}, [0]),
        ({"year": {"gt": 1999}}, [1]),
        ({"year": {"lte": "2"}}, [2]),
        ({"lang": "de"}, [0, 1]),
        ({"lang": "de", "year": {"gte": 2000}}, [1]),
        ({"other": None}, []),
    ],
)
def test_a_filter_allows_what_it_says(corpus, where, positions):
    assert allowed(corpus, where).nonzero()[0].tolist() == positions


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ([1], r"filter \[1\]: must be an object of field names"),
        ({"year": {"near": 2}}, r"filter on 'year': \{\"near\": 2\}: must be a value, \{\"in\": "),
        ({"year": {}}, "filter on 'year': {}: must be a value"),
        ({"year": {"in": 3}}, "must be a value"),
        ({"year": {"in": [[1]]}}, r"filter on 'year': \[1\]: must be a string, number, boolean or null"),
        ({"year": {"gte": 1, "lt": "2"}}, "bounds must be all numbers or all strings"),
        ({"year": {"gte": None}}, "bounds must be all numbers or all strings"),
    ],
)
def test_a_wrong_filter_is_refused(corpus, where, message):
    with pytest.raises(DataError, match=message):
        allowed(corpus, where)


def test_the_best_are_taken_among_the_allowed(tmp_path, corpus):
    index = BM25Index.build(corpus, tmp_path / "index")
    [everything], [some], [nothing] = (
        index.search(["fox"], 5, where) for where in (None, {"lang": "de"}, {"lang": "it"})
    )
    assert [hit for hit in everything if hit.passage.id in "01"] == some
    assert nothing == []
    assert some[0].passage.metadata == ROWS[1]
    [drawn] = RandomPassages(corpus).search(["fox"], 5, {"lang": "de"})
    assert sorted(hit.passage.id for hit in drawn) == ["0", "1"]


def test_a_filter_reads_the_corpus_once(corpus, monkeypatch):
    first = allowed(corpus, {"year": 1999, "lang": "de"})
    monkeypatch.setattr(filters, "load_columns", None)
    assert allowed(corpus, json.loads('{"lang": "de", "year": 1999}')) is first


def test_metadata_must_be_an_object(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", [{"id": "1", "text": "a", "metadata": [1]}])
    with pytest.raises(DataError, match=r'corpus.jsonl:1: "metadata" must be an object, found \[1\]'):
        Corpus(tmp_path / "corpus.jsonl")


SCALARS = [
    *(0, 1, -1, -0.0, 1.0, 1.5, 2**53, 2**53 + 1, float(2**53), 2**70, -(2**63) - 1, 10**400, 1e308),
    *(math.inf, -math.inf, math.nan, True, False, None, "", "1", "a", "ab", "\u00e4", "a\u0308", "\ud800"),
    *("\uffff", "\U0001d11e", "True"),
]
NAMES = st.sampled_from(["a", "\u00e9", "", "a.b"])
scalars = st.sampled_from(SCALARS) | st.floats() | st.integers() | st.text(max_size=3)
finite = scalars.filter(lambda value: not isinstance(value, float) or math.isfinite(value))
found = st.recursive(
    finite,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=2),
)
numbers = scalars.filter(lambda value: type(value) in (int, float))
strings = scalars.filter(lambda value: isinstance(value, str))
bounds = [
    st.dictionaries(st.sampled_from(["gte", "gt", "lte", "lt"]), of, min_size=1) for of in (numbers, strings)
]
condition = scalars | st.one_of(bounds) | st.fixed_dictionaries({"in": st.lists(scalars, max_size=4)})


def type_of(value):
    if isinstance(value, bool) or value is None:
        return repr(value)
    return "string" if isinstance(value, str) else "number" if isinstance(value, int | float) else "other"


def holds(value, condition) -> bool:
    """Return whether one value is what a filter asks, by the definition."""
    if isinstance(condition, dict) and "in" not in condition:
        ops = {"gte": operator.ge, "gt": operator.gt, "lte": operator.le, "lt": operator.lt}
        same = all(type_of(value) == type_of(bound) for bound in condition.values())
        return same and all(ops[which](value, bound) for which, bound in condition.items())
    asked = condition["in"] if isinstance(condition, dict) else [condition]
    return any(type_of(value) == type_of(each) and value == each for each in asked)


def agrees(metadata, where) -> bool:
    values = {name: each if isinstance(each, list) else [each] for name, each in metadata.items()}
    flat = {name: [v for v in each if not isinstance(v, list | dict)] for name, each in values.items()}
    return all(any(holds(value, asked) for value in flat.get(name, [])) for name, asked in where.items())


@given(
    st.lists(st.dictionaries(NAMES, found, max_size=3), min_size=1),
    st.dictionaries(NAMES, condition, max_size=2),
)
def test_columns_allow_what_a_scan_of_all_metadata_allows(tmp_path_factory, rows, where):
    path = tmp_path_factory.mktemp("rows") / "corpus.jsonl"
    write_jsonl(path, [{"id": str(i), "text": "a", "metadata": row} for i, row in enumerate(rows)])
    corpus = Corpus(path)
    assert allowed(corpus, where).tolist() == [agrees(passage.metadata, where) for passage in corpus]
    filters._MASKS.clear()


def test_columns_of_an_index_and_of_many_batches_allow_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(data.columns, "_VALUES_TOGETHER", 7)
    rows = [
        {"id": str(i), "text": "fox", "metadata": {"n": i % 7, "tags": [str(i % 3), i % 2]}}
        for i in range(50)
    ]
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    index = BM25Index.build(Corpus(tmp_path / "corpus.jsonl"), tmp_path / "index")
    monkeypatch.setattr(data.columns, "_write", None)  # nothing is read again
    for where in ({"n": 3}, {"tags": "2", "n": {"gte": 2, "lt": 5}}, {"tags": 1}, {"no": 1}):
        expected = [row["id"] for row in rows if agrees(row["metadata"], where)]
        assert np.flatnonzero(allowed(index.corpus, where)).tolist() == list(map(int, expected))
        assert sorted(hit.passage.id for hit in index.search(["fox"], 50, where)[0]) == sorted(expected)


def test_columns_of_an_older_index_are_kept_in_the_cache_and_made_anew_where_they_are_damaged(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(data.offsets, "_WORTH_CACHING_BYTES", 1)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    write_jsonl(tmp_path / "corpus.jsonl", [{"id": "1", "text": "a", "metadata": {"n": 1}}])
    for damaged in (False, False, True):
        cached = list((tmp_path / "home").rglob("*.metadata"))
        if damaged:
            content = cached[0].read_bytes()
            cached[0].write_bytes(content.replace(b"n", b"m", 1))
        filters._MASKS.clear()
        assert allowed(Corpus(tmp_path / "corpus.jsonl"), {"n": 1}).tolist() == [True]
        with monkeypatch.context() as patch:
            patch.setattr(data.columns, "_write", None)
            filters._MASKS.clear()
            assert allowed(Corpus(tmp_path / "corpus.jsonl"), {"n": 1}).tolist() == [True]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.jsonl", "home"]


def test_no_search_without_a_filter_waits_for_one_with(tmp_path, corpus, monkeypatch):
    """The metadata of an older index takes for ever; eight filters and two urls wait for it."""
    index = BM25Index.build(corpus, tmp_path / "index")
    (index.corpus.index_folder / METADATA).unlink()  # type: ignore[operator]
    go_on, write = threading.Event(), data.columns._write

    def write_slowly(*args) -> None:
        assert go_on.wait(60)
        write(*args)

    monkeypatch.setattr(data.columns, "_write", write_slowly)

    async def run() -> None:
        app = create_app({"default": HotSwappable(index)})
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:

            async def ask(path, **body):
                return (await client.post(path, json=body, timeout=60)).raise_for_status().json()

            wheres = [{"year": {"gte": 1999 - i}} for i in range(8)]
            slow = [asyncio.create_task(ask("/v1/search", queries=["fox"], where=where)) for where in wheres]
            slow += [asyncio.create_task(ask("/access", urls=[f"http://{i}"])) for i in range(2)]
            await asyncio.sleep(0)
            for _ in range(20):
                answer = await ask("/v1/search", queries=["fox"])
                assert len(answer["results"][0]["hits"]) == 3
                assert (await ask("/access", urls=["1"]))["result"] != [None]
                await client.get("/metrics")
            assert not any(task.done() for task in slow)
            go_on.set()
            *filtered, one, other = await asyncio.gather(*slow)
            assert all({h["id"] for h in each["results"][0]["hits"]} == {"0", "1"} for each in filtered)
            assert one["result"] == other["result"] == [None]
        await app.state.service.close()

    asyncio.run(run())


def test_a_filter_that_nobody_waits_for_any_more_is_there_for_the_next(corpus, monkeypatch):
    """A deadline passes while columns are read: the thread goes on, and its columns are used."""
    go_on, write = threading.Event(), data.columns._write
    monkeypatch.setattr(data.columns, "_write", lambda *args: (go_on.wait(60), write(*args)))

    async def run() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(filters.prepare(corpus, {"year": 1999}), 0.01)
        go_on.set()
        await filters.prepare(corpus, {"year": 1999})

    asyncio.run(run())
    assert allowed(corpus, {"year": 1999}).tolist() == [True, False, False, False, False]
