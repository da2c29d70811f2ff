"""MaxScore finds what ranking all sums finds, to the last bit, and leaves nothing behind."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retriever_server.indexes.postings import MaxScore, Postings, best

PASSAGES = 400


def random_postings(seed: int, dtype: type = np.float32, values: int = 0) -> Postings:
    """Thirty terms from rare to frequent; with `values` the weights are few different ones, for ties."""
    rng = np.random.default_rng(seed)
    lists = [np.flatnonzero(rng.random(PASSAGES) < share) for share in np.geomspace(0.001, 0.9, 30)]
    starts = np.concatenate([[0], np.cumsum([len(each) for each in lists])])
    count = int(starts[-1])
    weights = rng.integers(1, values + 1, count) if values else rng.random(count) * 4 + 0.01
    return Postings(starts, np.concatenate(lists).astype(np.int32), weights.astype(dtype), PASSAGES)


def exhaustive(postings, terms, k, mask, weights):
    scores = postings.scores(terms, weights)
    found = best(scores, k, mask)
    return found, scores[found]


@given(
    seed=st.integers(0, 10_000),
    terms=st.lists(st.integers(0, 29), max_size=12),
    k=st.integers(1, 500),
    masked=st.booleans(),
    weighed=st.booleans(),
    tied=st.booleans(),
)
def test_the_best_are_those_of_all_sums(seed, terms, k, masked, weighed, tied):
    postings = random_postings(seed, np.uint8 if tied else np.float32, 2 if tied else 0)
    rng = np.random.default_rng(seed)
    mask = rng.random(PASSAGES) < 0.3 if masked else None
    weights = rng.random(len(terms)) * 2 if weighed else None
    search = MaxScore(postings, exhaustive=0)
    for _ in range(2):  # what the first search added up must be gone
        for found, expected in zip(
            search.top(terms, k, mask, weights), exhaustive(postings, terms, k, mask, weights), strict=True
        ):
            np.testing.assert_array_equal(found, expected)


def test_terms_that_weigh_nothing_find_nothing():
    search = MaxScore(random_postings(0), exhaustive=0)
    assert len(search.top([5, 20], 10, None, [0.0, 0.0])[0]) == 0


def test_a_negative_weight_is_summed_in_full():
    postings = random_postings(1)
    found, _ = MaxScore(postings, exhaustive=0).top([28, 29], 10, None, [1.0, -0.5])
    np.testing.assert_array_equal(found, exhaustive(postings, [28, 29], 10, None, [1.0, -0.5])[0])


def test_long_lists_are_looked_up_not_read(monkeypatch):
    """A rare term decides: of the frequent one only its passages are asked."""
    postings = random_postings(2)
    asked = []
    look_up = Postings.look_up
    monkeypatch.setattr(
        Postings, "look_up", lambda self, term, of: asked.append((term, len(of))) or look_up(self, term, of)
    )
    rare = int(np.flatnonzero(postings.lengths(np.arange(30)) >= 5)[0])
    MaxScore(postings, exhaustive=0).top([rare, 29], 2, None, [1.0, 0.001])
    assert max(count for term, count in asked if term == 29) <= postings.lengths(np.array([rare]))[0]


def test_lists_are_not_read_where_whole_scores_are_out_of_reach(monkeypatch):
    """Ten passages with all three terms: the rare one alone gives them less than the others could add."""
    some, many = np.arange(10), np.arange(PASSAGES)
    lists, weights = [some, many, many], [np.full(10, 3), np.full(PASSAGES, 2), np.full(PASSAGES, 2)]
    starts, positions = np.array([0, 10, 410, 810]), np.concatenate(lists).astype(np.int32)
    postings = Postings(starts, positions, np.concatenate(weights).astype(np.float32), PASSAGES)
    search, read = MaxScore(postings, exhaustive=0), []
    search.top([0, 1, 2], 10)  # reads the largest weights
    list_of = Postings.list_of
    monkeypatch.setattr(Postings, "list_of", lambda self, term: read.append(int(term)) or list_of(self, term))
    assert search.top([0, 1, 2], 10)[1].tolist() == [7.0] * 10
    assert read == [0]


@pytest.mark.parametrize("threads", [4])
def test_threads_do_not_share_their_sums(threads):
    postings = random_postings(3)
    search, rng = MaxScore(postings, exhaustive=0), np.random.default_rng(0)
    queries = [rng.integers(0, 30, 6).tolist() for _ in range(200)]
    with ThreadPoolExecutor(threads) as pool:
        for terms, (found, _) in zip(queries, pool.map(lambda t: search.top(t, 5), queries), strict=True):
            np.testing.assert_array_equal(found, exhaustive(postings, terms, 5, None, None)[0])
