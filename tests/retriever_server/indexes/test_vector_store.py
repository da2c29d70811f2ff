"""Rows of int8 are ranked by products of integers, and found as by products of floats."""

import numpy as np
import pytest

from retriever_server.indexes.shards import quantise
from retriever_server.indexes.vector_store import Rows

RNG = np.random.default_rng(0)


# "close": more rows can be among the best than the first try takes
@pytest.mark.parametrize("spread", [1.0, 1e-3], ids=["apart", "close"])
@pytest.mark.parametrize("masked", [False, True])
def test_products_of_integers_find_what_floats_find(tmp_path, monkeypatch, spread, masked):
    monkeypatch.setattr("retriever_server.indexes.vector_store._BLOCK_BYTES", {"int8": 500 * 16 * 4})
    vectors = (RNG.standard_normal(16) + spread * RNG.standard_normal((4_000, 16))).astype(np.float32)
    vectors[7] = 0
    for shard in range(2):
        for name, array in quantise(vectors[2_000 * shard :][:2_000], "int8").items():
            np.save(tmp_path / f"{shard:05d}.{name}.npy", array)
    rows = Rows([tmp_path])
    queries = np.concatenate([RNG.standard_normal((3, 16)), np.zeros((1, 16))]).astype(np.float32)
    mask = RNG.random(4_000) < 0.5 if masked else np.ones(4_000, bool)
    for query, (positions, scores) in zip(queries, rows.search(queries, 10, mask), strict=True):
        exact = np.where(mask, rows[np.arange(4_000)] @ query, -np.inf)
        np.testing.assert_allclose(scores, np.sort(exact)[::-1][:10], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(scores, exact[positions], rtol=1e-5, atol=1e-6)
