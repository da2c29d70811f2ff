"""Rows of int8 are ranked by products of integers, and found as by products of floats."""

from itertools import pairwise

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


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_scores_are_the_same_to_the_last_bit_however_rows_are_cut_and_asked(tmp_path, dtype):
    vectors = (RNG.standard_normal(48) + 1e-3 * RNG.standard_normal((999, 48))).astype(np.float32)
    for name, cuts in {"whole": [0, 999], "parts": [0, 7, 8, 500, 999]}.items():
        (tmp_path / name).mkdir()
        for start, end in pairwise(cuts):
            for kind, array in quantise(vectors[start:end], dtype).items():
                np.save(tmp_path / name / f"{start:05d}.{kind}.npy", array)
    whole, parts = Rows([tmp_path / "whole"]), Rows([tmp_path / "parts"])
    queries = RNG.standard_normal((5, 48)).astype(np.float32)
    together = whole.search(queries, 20)
    for number, expected in enumerate(together):
        for found in (parts.search(queries, 20)[number], whole.search(queries[number : number + 1], 20)[0]):
            for got, want in zip(found, expected, strict=True):
                np.testing.assert_array_equal(got, want)
