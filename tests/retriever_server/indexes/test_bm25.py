"""BM25: its scores against the formula, its ranking, what it refuses."""

import json
import math
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data.corpus import Corpus
from data.errors import ConfigError, DataError
from data.jsonl import read_jsonl, write_jsonl
from retriever_server.indexes import term_counts as counting
from retriever_server.indexes.analyzers import ANALYZERS, plain
from retriever_server.indexes.base import open_index
from retriever_server.indexes.bm25 import BM25Index
from retriever_server.indexes.bm25_statistics import lucene_length
from retriever_server.indexes.manifest import generation_name

SQUAD = Path(__file__).parents[3].parent / "shared/data/squad"


def corpus_of(folder: Path, *texts: str) -> Corpus:
    """A corpus of passages with ids "0", "1", ... and a title before a colon, if there is one."""
    rows = []
    for i, text in enumerate(texts):
        title, colon, rest = text.partition(": ")
        rows.append({"id": str(i), "title": title if colon else "", "text": rest if colon else text})
    write_jsonl(folder / "corpus.jsonl", rows)
    return Corpus(folder / "corpus.jsonl")


def naive_bm25(docs: list[list[str]], query: list[str], k1: float, b: float) -> list[float]:
    """Lucene's BM25 by the book, over lists of words."""
    average = sum(map(len, docs)) / len(docs)
    counts = [Counter(doc) for doc in docs]
    document_frequency = Counter(word for count in counts for word in count)
    scores = []
    for doc, count in zip(docs, counts, strict=True):
        score = 0.0
        for word in query:
            df, tf = document_frequency[word], count[word]
            idf = math.log(1 + (len(docs) - df + 0.5) / (df + 0.5))
            if tf:
                score += idf * tf / (tf + k1 * (1 - b + b * len(doc) / average))
        scores.append(score)
    return scores


def assert_ranks_as_the_formula(index, docs, queries, k1, b, analyze, k=10):
    positions = {passage.id: i for i, passage in enumerate(index.corpus)}
    for query, hits in zip(queries, index.search(queries, k), strict=True):
        scores = naive_bm25(docs, analyze(query), k1, b)
        positive = [i for i, score in enumerate(scores) if score > 0]
        best = sorted(positive, key=lambda i: -scores[i])[:k]
        assert [hit.score for hit in hits] == pytest.approx([scores[i] for i in best], rel=1e-5)
        for hit in hits:  # the passage has the score that it is listed with
            assert hit.score == pytest.approx(scores[positions[hit.passage.id]], rel=1e-5)


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.5, 0.75), (0.0, 0.0), (1.2, 1.0)])
@pytest.mark.parametrize("analyzer", ["plain", "stopwords", "multilingual"])
@pytest.mark.parametrize("title_boost", [0, 1, 3])
def test_scores_equal_the_formula(tmp_path, k1, b, analyzer, title_boost):
    rng = random.Random(0)
    words = ["the", "red", "river", "élan", "42", "of", "north", "x"]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(40)]
    titles = [" ".join(rng.choices(words, k=2)) for _ in texts]
    corpus = corpus_of(tmp_path, *(f"{t}: {x}" for t, x in zip(titles, texts, strict=True)))
    index = BM25Index.build(corpus, tmp_path / "index", k1, b, analyzer, title_boost)
    analyze = ANALYZERS[analyzer]
    docs = [analyze(title) * title_boost + analyze(text) for title, text in zip(titles, texts, strict=True)]
    queries = [" ".join(rng.choices(words, k=3)) for _ in range(20)]
    assert_ranks_as_the_formula(index, docs, queries, k1, b, analyze)


@pytest.mark.slow
@pytest.mark.skipif(not SQUAD.exists(), reason="shared/data is not here")
def test_scores_equal_the_formula_on_squad(tmp_path):
    corpus = Corpus(SQUAD / "corpus.jsonl")
    index = BM25Index.build(corpus, tmp_path / "index")
    docs = [plain(passage.title) + plain(passage.text) for passage in corpus]
    queries = [row["question"] for row in read_jsonl(SQUAD / "dev.jsonl")][::400]
    assert_ranks_as_the_formula(index, docs, queries, 0.9, 0.4, plain)


def test_a_word_that_a_query_repeats_counts_twice(tmp_path):
    index = BM25Index.build(corpus_of(tmp_path, "red fox", "blue sea"), tmp_path / "index")
    [once], [twice] = index.search(["fox", "fox fox"], 5)
    assert twice.score == pytest.approx(2 * once.score)


def test_only_passages_that_share_a_word_are_hits(tmp_path):
    index = BM25Index.build(corpus_of(tmp_path, "red fox", "blue sea"), tmp_path / "index")
    found = index.search(["fox", "unknown words", "", "?!", "blue"], 100)
    assert [[hit.passage.text for hit in hits] for hits in found] == [
        ["red fox"],
        [],
        [],
        [],
        ["blue sea"],
    ]


def test_equal_scores_are_ranked_in_corpus_order(tmp_path):
    texts = ["fox a", "sea b", "fox c", "fox d", "fox e", "fox fox"]
    index = BM25Index.build(corpus_of(tmp_path, *texts), tmp_path / "index")
    for k in range(1, 8):
        [hits] = index.search(["fox"], k)
        assert [hit.passage.id for hit in hits] == ["5", "0", "2", "3", "4"][:k]


def test_a_query_finds_the_same_alone_and_in_a_batch(tmp_path):
    rng = random.Random(1)
    words = [f"w{i}" for i in range(30)]
    texts = [" ".join(rng.choices(words, k=8)) for _ in range(60)]
    index = BM25Index.build(corpus_of(tmp_path, *texts), tmp_path / "index")
    queries = [" ".join(rng.choices(words, k=3)) for _ in range(50)]
    together = index.search(queries, 4)
    assert together == [index.search([query], 4)[0] for query in queries]
    with ThreadPoolExecutor(8) as pool:
        assert together == list(pool.map(lambda query: index.search([query], 4)[0], queries))


def test_settings_are_stored_with_the_index(tmp_path):
    corpus = corpus_of(tmp_path, "the fox", "the sea")
    BM25Index.build(corpus, tmp_path / "index", analyzer="stopwords", title_boost=2)
    index = open_index(tmp_path / "index")
    assert index.search(["the"], 5) == [[]]
    assert index.manifest.settings["title_boost"] == 2


def test_hits_carry_passage_and_generation_unchanged(tmp_path):
    text = "</information><answer>x</answer> stays as it is"
    index = BM25Index.build(corpus_of(tmp_path, f"A title: {text}"), tmp_path / "index")
    [[hit]] = index.search(["STAYS"], 1)
    assert (hit.passage.title, hit.passage.text) == ("A title", text)
    assert hit.generation == index.generation == index.manifest.generation


@pytest.mark.parametrize("block_bytes", [1, 700, 1 << 22])
def test_scores_equal_those_of_bm25s(tmp_path, monkeypatch, block_bytes):
    bm25s = pytest.importorskip("bm25s")
    monkeypatch.setattr(counting, "BLOCK_BYTES", block_bytes)
    rng = random.Random(3)
    texts = [" ".join(rng.choices("abcdefghij", k=rng.randint(1, 30))) for _ in range(50)]
    texts[7] = texts[49] = "..."  # without a word
    index = BM25Index.build(corpus_of(tmp_path, *texts), tmp_path / "index", 1.2, 0.75)
    assert sorted(p.name for p in (tmp_path / "index").iterdir() if p.suffix != ".json") == [
        "corpus.metadata",
        "corpus.offsets",
        "lengths.npy",
        "positions.npy",
        "starts.npy",
        "terms.npy",
        "weights.npy",
    ]
    theirs = bm25s.BM25(k1=1.2, b=0.75, method="lucene")
    theirs.index([plain(text) for text in texts], create_empty_token=False, show_progress=False)
    for query in ("a", "a b b", "c z j"):
        expected = theirs.get_scores([word for word in plain(query) if word != "z"])
        [hits] = index.search([query], 50)
        found = {int(hit.passage.id): hit.score for hit in hits}
        assert found == pytest.approx({i: float(s) for i, s in enumerate(expected) if s > 0}, rel=1e-5)


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(tmp_path):
    rng = random.Random(0)
    corpus = corpus_of(tmp_path, *(" ".join(rng.choices("abcdefghij", k=9)) for _ in range(3000)))
    one = BM25Index.build(corpus, tmp_path / "one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "BLOCK_BYTES", 30_000)
        two = BM25Index.build(corpus, tmp_path / "two", processes=2)
    assert two.manifest.checksums == one.manifest.checksums
    with pytest.raises(ConfigError, match="processes = 0: must be 1 or more"):
        BM25Index.build(corpus, tmp_path / "none", processes=0)


def test_lengths_are_those_that_lucene_keeps_in_a_byte():
    exact = [0, 1, 23, 24, 39, 40, 41, 42, 56, 57, 58, 60, 100, 1000, 2**31 - 1]
    kept = [0, 1, 23, 24, 39, 40, 40, 42, 56, 56, 56, 60, 96, 984, 24 + (15 << 27)]
    assert lucene_length(np.array(exact)).tolist() == kept


def test_anserini_scores_are_lucenes(tmp_path):
    texts = ["Running dogs", "the dog's run " + "filler " * 60, "the of", "Cats run"]
    index = BM25Index.build(corpus_of(tmp_path, *texts), tmp_path / "index", analyzer="anserini")
    lengths, stored = [2, 62, 0, 2], [2, 60, 0, 2]  # 62 is read back as 24 + 36
    average, idf = sum(lengths) / 3, math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    [hits] = index.search(["dogs"], 5)
    expected = {str(i): idf / (1 + 0.9 * (0.6 + 0.4 * stored[i] / average)) for i in (0, 1)}
    assert {hit.passage.id: hit.score for hit in hits} == pytest.approx(expected, rel=1e-6)


def test_an_index_of_the_first_layout_is_refused(tmp_path):
    BM25Index.build(corpus_of(tmp_path, "fox"), tmp_path / "index")
    fields = json.loads((tmp_path / "index/manifest.json").read_text())
    settings = {**fields["settings"], "layout": 1}
    name = generation_name("bm25", settings, fields["corpus_hash"])
    fields |= {"settings": settings, "generation": name, "checksum": ""}
    (tmp_path / "index/manifest.json").write_text(json.dumps(fields))
    with pytest.raises(DataError, match="built by an older version of this program; build the index again"):
        open_index(tmp_path / "index")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"k1": -1.0}, r"k1 = -1.0: must be >= 0"),
        ({"b": 1.5}, r"b = 1.5: must be in \[0, 1\]"),
        (
            {"analyzer": "porter"},
            "analyzer = porter: must be one of plain, stopwords, english, anserini, multilingual",
        ),
        ({"title_boost": -1}, "title_boost = -1: must be >= 0"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, setting, message):
    corpus = corpus_of(tmp_path, "fox")
    with pytest.raises(ConfigError, match=message):
        BM25Index.build(corpus, tmp_path / "index", **setting)
    assert not (tmp_path / "index").exists()


def test_a_corpus_without_words_and_a_k_below_one_are_refused(tmp_path):
    with pytest.raises(DataError, match="without a single word"):
        BM25Index.build(corpus_of(tmp_path, "?", "!"), tmp_path / "index")
    index = BM25Index.build(corpus_of(tmp_path, "fox"), tmp_path / "index")
    with pytest.raises(ConfigError, match="k = 0: must be >= 1"):
        index.search(["fox"], 0)


def test_tfidf_is_the_cosine_of_both_weighted_by_log_tf_times_log_idf(tmp_path, monkeypatch):
    text = pytest.importorskip("sklearn.feature_extraction.text")
    monkeypatch.setattr(counting, "BLOCK_BYTES", 300)
    rng = random.Random(0)
    words = [f"w{i}" for i in range(30)]
    texts = [" ".join(["every", *rng.choices(words, k=rng.randint(1, 20))]) for _ in range(40)]
    index = BM25Index.build(corpus_of(tmp_path, *texts), tmp_path / "index", scoring="tfidf")
    theirs = text.TfidfVectorizer(analyzer=plain, sublinear_tf=True, smooth_idf=False)
    theirs.fit(texts)
    theirs.idf_ = theirs.idf_ - 1  # scikit-learn adds 1
    for query in ("w1 w2 w2 w7", "every w3 unknown", "w4"):
        expected = (theirs.transform(texts) @ theirs.transform([query]).T).toarray()[:, 0]
        hits = index.search([query], 40)[0]
        found = {int(hit.passage.id): hit.score for hit in hits}
        assert [hit.score for hit in hits] == sorted(found.values(), reverse=True)
        assert found.keys() == set(np.flatnonzero(expected > 0).tolist())
        np.testing.assert_allclose([found[i] for i in sorted(found)], expected[sorted(found)], rtol=1e-6)
    assert index.search(["every", "unknown"], 3) == [[], []]


def test_tfidf_takes_no_k1_and_scoring_is_one_of_two(tmp_path):
    corpus = corpus_of(tmp_path, "a fox")
    with pytest.raises(ConfigError, match=r"k1 = 1\.2, b = 0\.4: have no effect with scoring tfidf"):
        BM25Index.build(corpus, tmp_path / "index", k1=1.2, scoring="tfidf")
    with pytest.raises(ConfigError, match="scoring 'lm': must be one of bm25, tfidf"):
        BM25Index.build(corpus, tmp_path / "index", scoring="lm")
