"""Qdrant in the client's local mode against the exact product over the same vectors."""

from importlib.util import find_spec

import numpy as np
import pytest

from data.errors import ConfigError, DataError, RetrieverUnavailable
from data.records import Passage
from examples.qdrant.qdrant import Qdrant
from retriever_server.encoders.spec import rows_of
from tests.retriever_server.test_filters import agrees
from tests.retriever_server.tiny_encoders import FakeEncoder

pytestmark = pytest.mark.skipif(find_spec("qdrant_client") is None, reason="needs qdrant-client")

TEXTS = ["red fox", "blue fox sea", "green sea river", "a big city", "the capital city", "old river in north"]
PASSAGES = [Passage(f"p{i}", text, f"T{i}", {"year": 1990 + i, "lang": "de" if i % 2 else "fr"})
            for i, text in enumerate(TEXTS)]  # fmt: skip
QUERIES = ["fox", "river sea", "capital city"]


def expected(encoder: FakeEncoder, query: str, allowed=PASSAGES) -> list[tuple[str, float]]:
    asked = rows_of(encoder.encode([query], "query"), 0)
    scores = {}
    for passage in allowed:
        stored = rows_of(encoder.encode([encoder.spec.render(passage)], "passage"), 0)
        scores[passage.id] = float((asked @ stored.T).max(axis=1).sum())
    return sorted(scores.items(), key=lambda item: -item[1])


@pytest.mark.parametrize(
    ("kind", "vector"), [("dense", None), ("dense", "d"), ("sparse", "s"), ("multi", None)]
)
def test_it_finds_what_the_exact_product_finds(kind, vector, tmp_path):
    encoder = FakeEncoder(kind, dimension=64)
    retriever = Qdrant("c", encoder, path=str(tmp_path), vector=vector)
    retriever.upload(PASSAGES)
    assert retriever.generation == f"qdrant(c: 6 points, {encoder.spec.hash})"
    for query, ranking in zip(QUERIES, retriever.search(QUERIES, 3), strict=True):
        best = [(i, score) for i, score in expected(encoder, query)[:3] if kind != "sparse" or score > 0]
        assert np.allclose(
            [hit.score for hit in ranking][: len(best)], [score for _, score in best], atol=1e-4
        )
        assert ranking[0].passage == next(p for p in PASSAGES if p.id == ranking[0].passage.id)
        assert ranking[0].generation == retriever.generation
    assert retriever.search([], 3) == []
    retriever.close()


@pytest.mark.parametrize(
    "where",
    [
        {"year": 1992},
        {"year": {"in": [1990, 1993]}},
        {"year": {"gte": 1991, "lt": 1994}, "lang": "de"},
        {"lang": {"in": ["fr"]}},
        {"year": 1.5},
        {"absent": 1},
    ],
)
def test_a_filter_allows_what_ours_does(where, tmp_path):
    retriever = Qdrant("c", FakeEncoder(dimension=32), path=str(tmp_path))
    retriever.upload(PASSAGES)
    allowed = {passage.id for passage in PASSAGES if agrees(passage.metadata, where)}
    assert {hit.passage.id for hit in retriever.search(["fox"], 9, where)[0]} == allowed
    with pytest.raises(DataError):
        retriever.search(["fox"], 9, {"year": {"near": 3}})
    with pytest.raises(ConfigError, match="bounds for numbers"):
        retriever.search(["fox"], 9, {"lang": {"gte": "d"}})
    retriever.close()


def test_what_fails_is_a_typed_error(tmp_path):
    retriever = Qdrant("absent", FakeEncoder(), path=str(tmp_path))
    with pytest.raises(RetrieverUnavailable, match="absent: Collection absent not found"):
        retriever.search(["fox"], 1)
    retriever.close()
    with pytest.raises(ConfigError, match="must be one of the two"):
        Qdrant("c", FakeEncoder())
    with pytest.raises(RetrieverUnavailable, match=r"Qdrant at http://127\.0\.0\.1:9, c: "):
        Qdrant("c", FakeEncoder(), url="http://127.0.0.1:9", deadline_seconds=1)
