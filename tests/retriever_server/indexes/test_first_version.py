"""Files that the first version (4a1e685) wrote still open, and find the same."""

from pathlib import Path

import pytest

from retriever_server.indexes.base import open_index, verify_index

WRITTEN = Path(__file__).parent / "first_version"


@pytest.mark.parametrize(
    ("query", "where", "found"),
    [
        ("fox river", None, {"a": 0.8419661521911621, "c": 0.34888923168182373}),
        ("fox river", {"year": {"gte": 2000}}, {"c": 0.34888923168182373}),
        ("fox river", {"lang": "de"}, {"a": 0.8419661521911621}),
        ("blue sea", None, {"b": 1.0873479843139648, "c": 0.27740517258644104}),
        ("blue sea", {"lang": "de"}, {}),
    ],
)
def test_an_index_of_the_first_version_finds_the_same(query, where, found):
    index = open_index(WRITTEN / "index")
    [hits] = index.search([query], 3, where)
    assert {hit.passage.id: hit.score for hit in hits} == pytest.approx(found, rel=1e-6)
    assert [hit.generation for hit in hits] == ["bm25-5d5539600698"] * len(hits)
    assert verify_index(WRITTEN / "index").generation == index.generation


def test_what_lies_beside_a_corpus_of_the_first_version_is_neither_read_nor_written():
    before = {path: path.read_bytes() for path in WRITTEN.rglob("*.*")}
    assert WRITTEN / "corpus.jsonl.offsets.npy" in before
    assert open_index(WRITTEN / "index").corpus[0].contents == '"Red fox"\nA fox by the river.'
    assert {path: path.read_bytes() for path in WRITTEN.rglob("*.*")} == before
