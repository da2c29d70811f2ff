"""Metadata filters: what they allow, what they refuse, and that the best k are taken among the allowed."""

import json

import pytest

import retriever_server.filters as filters
from data.corpus import Corpus
from data.errors import DataError
from data.jsonl import write_jsonl
from retriever_server.controls import RandomPassages
from retriever_server.filters import allowed
from retriever_server.indexes.bm25 import BM25Index

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
    monkeypatch.setattr(filters, "_matches", None)
    assert allowed(corpus, json.loads('{"lang": "de", "year": 1999}')) is first


def test_metadata_must_be_an_object(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", [{"id": "1", "text": "a", "metadata": [1]}])
    with pytest.raises(DataError, match=r'corpus.jsonl:1: "metadata" must be an object, found \[1\]'):
        Corpus(tmp_path / "corpus.jsonl")
