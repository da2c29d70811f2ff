"""Indexes of vectors: equal to brute force, resumable, refused with the wrong encoder or damaged files."""

import json

import numpy as np
import pytest

from data.corpus import Corpus
from data.errors import ConfigError, DataError
from data.jsonl import write_jsonl
from data.records import Passage
from retriever_server.encoders.spec import EncodingSpec, Multi
from retriever_server.indexes import checksums as integrity
from retriever_server.indexes.ann import AnnIndex, default_search
from retriever_server.indexes.base import open_index, verify_index
from retriever_server.indexes.bm25 import BM25Index
from retriever_server.indexes.encoded import EncodedIndex
from retriever_server.indexes.flat import FlatIndex
from retriever_server.indexes.inverted import InvertedIndex
from retriever_server.indexes.manifest import INDEX_KINDS
from retriever_server.indexes.maxsim import FixedEncoding, MaxSimIndex
from retriever_server.indexes.shards import quantise
from retriever_server.retrievers.cache import Cached
from retriever_server.retrievers.shard import Sharded
from tests.retriever_server.tiny_encoders import WORDS, FakeEncoder
from tests.samples import quick

KINDS = {"flat": FlatIndex, "ann": AnnIndex, "inverted": InvertedIndex, "maxsim": MaxSimIndex}
RNG = np.random.default_rng(0)
TEXTS = [" ".join(RNG.choice(WORDS, RNG.integers(3, 9))) for _ in range(100)]
QUERIES = [" ".join(RNG.choice(WORDS, 3)) for _ in range(8)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    rows = [{"id": str(i), "text": t, "metadata": {"even": i % 2 == 0}} for i, t in enumerate(TEXTS)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    write_jsonl(path, rows)
    return Corpus(path)


def some_passages(corpus: Corpus) -> list[list[Passage]]:
    """Other passages for each query, one without id here, one that has another text here."""
    strangers = [Passage("none", "river"), Passage("99", "another text")]
    return [[corpus[(7 * i + j) % 100] for j in range(5 + i)] + strangers for i in range(len(QUERIES))]


@pytest.mark.parametrize("kind", KINDS)
def test_any_passage_is_scored_as_a_search_of_all_would(kind: str, corpus: Corpus, tmp_path) -> None:
    encoder = FakeEncoder(KINDS[kind].vectors)
    index = KINDS[kind].build(corpus, tmp_path / "index", encoder, "float32")
    asked = some_passages(corpus)
    for row, each, scores in zip(brute_force(encoder), asked, index.score(QUERIES, asked), strict=True):
        known = [passage.id for passage in each[:-2]]
        assert sorted(scores) == sorted(known)
        assert [scores[id_] for id_ in known] == pytest.approx([row[int(id_)] for id_ in known], abs=1e-4)
    assert index.score(["river"], [[]]) == [{}]
    parts = Cached(Sharded([index, index]))
    assert parts.score(QUERIES, asked) == index.score(QUERIES, asked)


def test_bm25_scores_any_passage(corpus: Corpus, tmp_path) -> None:
    for scoring in ("bm25", "tfidf"):
        index = BM25Index.build(corpus, tmp_path / scoring, scoring=scoring)
        asked = some_passages(corpus)
        rankings = index.search(QUERIES, 100)
        for hits, each, scores in zip(rankings, asked, index.score(QUERIES, asked), strict=True):
            found = {hit.passage.id: hit.score for hit in hits}
            assert scores == {passage.id: found.get(passage.id, 0.0) for passage in each[:-2]}


def test_what_was_skipped_has_no_score(corpus: Corpus, tmp_path) -> None:
    index = FlatIndex.build(corpus, tmp_path / "index", FakeEncoder("dense"), "float32")
    index.skipped = np.array([3])
    assert [*index.score(["river"], [[corpus[3], corpus[4]]])[0]] == ["4"]
    assert index.score(["river"], [[corpus[3]]]) == [{}]


def brute_force(encoder: FakeEncoder) -> np.ndarray:
    """Scores of all passages for all queries, by the definition.   (Q, P)"""
    queries, passages = encoder.encode(QUERIES, "query"), encoder.encode(TEXTS, "passage")
    if isinstance(queries, Multi):
        pairs = [[(q @ p.T).max(1).sum() for p in map(passages.__getitem__, range(100))]
                 for q in map(queries.__getitem__, range(len(QUERIES)))]  # fmt: skip
        return np.array(pairs)
    scores = queries @ passages.T
    return scores if isinstance(scores, np.ndarray) else scores.toarray()


def assert_finds_the_best(index: EncodedIndex, scores: np.ndarray, tolerance: float, k: int = 7, where=None):
    allowed = np.array([where is None or i % 2 == 0 for i in range(scores.shape[1])])
    for row, hits in zip(scores, index.search(QUERIES, k, where), strict=True):
        best = np.sort(row[allowed])[::-1][:k]
        assert [hit.score for hit in hits] == pytest.approx(best[: len(hits)].tolist(), abs=tolerance)
        assert [hit.score for hit in hits] == pytest.approx(
            [row[int(h.passage.id)] for h in hits], abs=tolerance
        )
        assert all(allowed[int(hit.passage.id)] for hit in hits)
        assert (
            len({hit.passage.id for hit in hits}) == len(hits) == min(k, (row[allowed] > 0).sum())
            or min(row) <= 0
        )
        assert {hit.generation for hit in hits} == {index.generation}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3), ("int8", 2e-2)])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_brute_force(tmp_path, corpus, kind, dtype, tolerance):
    encoder = FakeEncoder(KINDS[kind].vectors)
    index = KINDS[kind].build(corpus, tmp_path / "i", encoder, dtype, passages_per_shard=33)
    tolerance *= 3 if kind == "maxsim" else 1
    assert index.kind == index.manifest.kind == kind
    assert_finds_the_best(index, brute_force(encoder), tolerance)
    assert_finds_the_best(index, brute_force(encoder), tolerance, where={"even": True})
    assert len(index.search(QUERIES[:1], 1000, {"even": True})[0]) <= 50
    assert index.search([], 3) == []
    with pytest.raises(ConfigError, match="k = 0: must be >= 1"):
        index.search(QUERIES, 0)


def test_flat_equals_numpy_over_blocks_and_shards(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr("retriever_server.indexes.vector_store._BLOCK_BYTES", {"cpu": 11 * 16 * 4})
    encoder = FakeEncoder()
    index = FlatIndex.build(corpus, tmp_path / "i", encoder, "float32", passages_per_shard=27)
    vectors = encoder.encode(TEXTS, "passage")
    np.testing.assert_array_equal(index.rows[np.arange(99, -1, -1)], vectors[::-1])
    queries = RNG.standard_normal((5, 16)).astype(np.float32)
    for query, (positions, scores) in zip(queries, index.rank(queries, 100), strict=True):
        np.testing.assert_allclose(scores, (vectors @ query)[positions], atol=1e-5)
        assert sorted(positions) == list(range(100))
        assert (np.diff(scores) <= 0).all()


def test_int8_is_within_half_a_scale():
    vectors = np.concatenate([RNG.standard_normal((50, 8)), np.zeros((1, 8))]).astype(np.float32)
    stored = quantise(vectors, "int8")
    error = np.abs(stored["vectors"] * stored["vectors-scales"][:, None] - vectors)
    assert (error <= stored["vectors-scales"][:, None] * 0.5001).all()


def test_ann_finds_what_flat_finds(tmp_path):
    assert default_search("IVF4096_HNSW32,SQ8") == "nprobe=256"
    texts = [f"w{i % 50} v{i % 61} u{i}" for i in range(2000)]
    write_jsonl(tmp_path / "c.jsonl", [{"id": str(i), "text": text} for i, text in enumerate(texts)])
    corpus, encoder = Corpus(tmp_path / "c.jsonl"), FakeEncoder(dimension=24)
    queries = encoder.encode([f"w{i} v{i + 3} u{i * 9}" for i in range(40)], "query")
    flat = FlatIndex.build(corpus, tmp_path / "flat", encoder, "int8").rank(queries, 10)
    for name, settings in {"hnsw": {}, "ivf": {"factory": "IVF64,SQ8"}, "sq": {"factory": "SQ8"}}.items():
        found = AnnIndex.build(corpus, tmp_path / name, encoder, "int8", **settings).rank(queries, 10)
        recall = np.mean([len(set(a[0]) & set(b[0])) / 10 for a, b in zip(found, flat, strict=True)])
        assert recall >= 0.95, name
    for setting in ({"factory": "IVF64,Nonsense"}, {"search": "nprobes=3"}, {"factory": "IVF4096,Flat"}):
        with pytest.raises(ConfigError, match=rf"{next(iter(setting))} = "):
            AnnIndex.build(corpus, tmp_path / "wrong", encoder, **setting)


def test_a_pruned_inverted_index_keeps_the_largest_weights_of_each_passage(tmp_path, corpus):
    encoder = FakeEncoder("sparse", dimension=64)
    vectors = encoder.encode(TEXTS, "passage").toarray()
    built = {"dtype": "float32", "passages_per_shard": 33}
    index = InvertedIndex.build(corpus, tmp_path / "i", encoder, terms_per_passage=3, **built)
    for position in (0, 32, 33, 99):
        kept, whole = index.stored(position)[0], vectors[position]
        assert (kept > 0).sum() == min(3, (whole > 0).sum())
        np.testing.assert_array_equal(kept[kept > 0], whole[kept > 0])
        assert kept[kept > 0].min() >= whole[kept == 0].max()
    open_index(tmp_path / "i", encoder=encoder)  # what was cut away is no other encoder
    with pytest.raises(DataError, match="stored with another vector"):
        other = FakeEncoder("sparse", dimension=64)
        other._counts = lambda words: np.ones(64, np.float32)  # type: ignore[method-assign]
        open_index(tmp_path / "i", encoder=other)
    with pytest.raises(ConfigError, match="terms_per_passage = 0: must be >= 1"):
        InvertedIndex.build(corpus, tmp_path / "wrong", encoder, terms_per_passage=0)


def test_impacts_of_eight_bits_are_within_half_a_step_and_take_a_quarter(tmp_path, corpus):
    encoder = FakeEncoder("sparse", dimension=64)
    vectors = encoder.encode(TEXTS, "passage").toarray()
    index = InvertedIndex.build(corpus, tmp_path / "i", encoder, "int8")
    assert index._searches[0].postings.weights.dtype == np.uint8
    for position in range(100):
        np.testing.assert_allclose(index.stored(position)[0], vectors[position], atol=vectors.max() / 509)
    assert verify_index(tmp_path / "i").corpus_count == 100


def test_fixed_encodings_of_the_passages_find_most_of_the_best(tmp_path, corpus):
    encoder = FakeEncoder("multi")
    index = MaxSimIndex.build(corpus, tmp_path / "i", encoder, repetitions=20, passages_per_shard=40)
    queries = encoder.encode(QUERIES, "query")
    exact = index.rank(queries, 5)
    index.candidates = 25
    found = index.rank(queries, 5)
    assert np.mean([len(set(a[0]) & set(b[0])) / 5 for a, b in zip(found, exact, strict=True)]) > 0.7


def test_maxsim_scores_every_passage_where_it_is_told(tmp_path, corpus):
    encoder = FakeEncoder("multi")
    MaxSimIndex.build(corpus, tmp_path / "i", encoder, "float32", passages_per_shard=40)
    assert_finds_the_best(
        open_index(tmp_path / "i", encoder=encoder, candidates=0), brute_force(encoder), 1e-4
    )
    with pytest.raises(ConfigError, match=r"candidates = -1: must be >= 0"):
        open_index(tmp_path / "i", encoder=encoder, candidates=-1)


@pytest.mark.parametrize(
    "factory",
    quick(
        ["PCA8,IVF5,SQ8"],
        ["HNSW32", "HNSW4", "IVF10,Flat", "IVF10,SQ8", "SQ8", "PCA8,IVF5,SQ8"],
    ),
)
@pytest.mark.parametrize("alike", quick([True], [False, True]))
def test_ann_gives_as_many_hits_as_there_are(tmp_path, factory, alike):
    """A graph over passages that are all alike is hardly connected; one list of many holds few passages."""
    texts = ["red fox"] * 400 if alike else [" ".join(RNG.choice(WORDS, 5)) for _ in range(400)]
    write_jsonl(tmp_path / "c.jsonl", [{"id": str(i), "text": text} for i, text in enumerate(texts)])
    search = "nprobe=1" if "IVF" in factory else "efSearch=16" if "HNSW" in factory else None
    built = (Corpus(tmp_path / "c.jsonl"), tmp_path / "i", FakeEncoder())
    index = AnnIndex.build(*built, "float32", factory=factory, search=search)
    for k in (1, 10, 100, 390, 399, 400, 401, 1000):
        for hits in index.search(QUERIES, k):
            assert len({hit.passage.id for hit in hits}) == len(hits) == min(k, 400)
    for hits in index.search(QUERIES, 400):
        assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", [None, {"even": True}])
def test_there_are_as_many_hits_as_asked_for_or_as_match(tmp_path, corpus, kind, where):
    encoder = FakeEncoder(KINDS[kind].vectors)
    index = KINDS[kind].build(corpus, tmp_path / "i", encoder, passages_per_shard=33)
    if kind == "maxsim":
        index.candidates = 20
    match = (brute_force(encoder) > 0) if kind == "inverted" else np.ones((len(QUERIES), 100), bool)
    match[:, 1::2] &= where is None
    for k in (1, 19, 21, 49, 50, 51, 99, 100, 101):
        for hits, row in zip(index.search(QUERIES, k, where), match, strict=True):
            assert len({hit.passage.id for hit in hits}) == len(hits) == min(k, row.sum())


def test_a_fixed_encoding_of_one_token_each_is_its_inner_product():
    tokens = RNG.standard_normal((2, 8)).astype(np.float32)
    one, other = (Multi(tokens[[i]], np.array([0, 1])) for i in (0, 1))
    encoding = FixedEncoding(8, repetitions=300, bits=2, projection=8)
    product = encoding.encode(one, True) @ encoding.encode(other, False).T / 300
    assert product.item() == pytest.approx(float(tokens[0] @ tokens[1]), abs=0.8)


class Killed(Exception):
    pass


class DyingEncoder(FakeEncoder):
    """Dies when it is asked for more than `texts` texts."""

    texts = 50

    def encode(self, texts, role):
        if role == "passage" and self.encoded + len(texts) > self.texts:
            raise Killed
        return super().encode(texts, role)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_build_goes_on_and_ends_the_same(tmp_path, corpus, kind):
    vectors = KINDS[kind].vectors
    with pytest.raises(Killed):
        KINDS[kind].build(corpus, tmp_path / "i", DyingEncoder(vectors), passages_per_shard=20)
    assert not (tmp_path / "i").exists()
    encoder, seen = FakeEncoder(vectors), []

    def progress(positions, total):
        for position in positions:
            seen.append((position, total))
            yield position

    options = {"passages_per_shard": 20}
    index = KINDS[kind].build(corpus, tmp_path / "i", encoder, progress=progress, **options)
    assert seen == [(position, 60) for position in range(40, 100)]
    whole = KINDS[kind].build(corpus, tmp_path / "whole", FakeEncoder(vectors), **options)
    assert index.manifest.checksums == whole.manifest.checksums
    assert {p.name for p in tmp_path.iterdir()} == {"i", "whole"}
    encoder.encoded = 0
    again = KINDS[kind].build(corpus, tmp_path / "i", encoder, **options)  # it is there: checked alone
    assert encoder.encoded == 4 and again.generation == index.generation


def test_a_build_killed_while_it_is_put_together_encodes_nothing_again(tmp_path, corpus, monkeypatch):
    def write(*_) -> None:
        raise Killed

    encoder = FakeEncoder()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(FlatIndex, "write", write)
        FlatIndex.build(corpus, tmp_path / "i", encoder)
    assert encoder.encoded == 100 and not (tmp_path / "i").exists()
    FlatIndex.build(corpus, tmp_path / "i", encoder)
    assert encoder.encoded == 100 + 4  # the check on opening
    assert {p.name for p in tmp_path.iterdir()} == {"i"}


def test_parts_of_the_shards_are_encoded_apart(tmp_path, corpus):
    encoder, out = FakeEncoder(), tmp_path / "i"
    shards, _ = FlatIndex.plan(corpus, out, encoder, "float16", 15)
    shards.encode(part=(2, 3))
    assert shards.missing() == [0, 2, 3, 5, 6] and shards.missing((2, 3)) == []
    (shards.folder / "00004.vectors.npy").write_bytes(b"cut short")
    assert shards.missing() == [0, 2, 3, 4, 5, 6]
    index = FlatIndex.build(corpus, out, encoder, passages_per_shard=15)
    assert_finds_the_best(index, brute_force(encoder), 2e-3)


def test_vectors_that_are_broken_are_refused(tmp_path, corpus):
    encoder = FakeEncoder()
    encoder._known["fox"] = np.full(16, np.nan, np.float32)
    with pytest.raises(DataError, match="fake: NaN or infinite in the vectors of passages '0' to '99'"):
        FlatIndex.build(corpus, tmp_path / "i", encoder)


def test_the_wrong_encoder_is_refused_with_what_differs(tmp_path, corpus):
    FlatIndex.build(corpus, tmp_path / "i", FakeEncoder())
    with pytest.raises(DataError, match="another encoder \\(fingerprint: 'seed 0', here 'seed 1'\\)"):
        open_index(tmp_path / "i", encoder=FakeEncoder(seed=1))
    liar = FakeEncoder(seed=1)
    liar.spec = FakeEncoder().spec
    with pytest.raises(DataError, match=r"passage '0' is stored with another vector .*cosine"):
        open_index(tmp_path / "i", encoder=liar)
    with pytest.raises(ConfigError, match="makes sparse vectors, an index of kind flat needs dense"):
        FlatIndex.build(corpus, tmp_path / "j", FakeEncoder("sparse"))
    with pytest.raises(ConfigError, match="dtype = 'int4': must be one of float32, float16, int8"):
        FlatIndex.build(corpus, tmp_path / "j", FakeEncoder(), "int4")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_by_name(tmp_path, corpus, kind):
    encoder = FakeEncoder(KINDS[kind].vectors)
    KINDS[kind].build(corpus, tmp_path / "i", encoder)
    assert verify_index(tmp_path / "i").kind == kind
    for path in sorted((tmp_path / "i").glob("*[!n]")):  # all but the manifest
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        with pytest.raises(DataError, match=f"{path.name}: missing or not {len(whole)} bytes"):
            open_index(tmp_path / "i", encoder=encoder)
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(DataError, match=f"{path.name}: changed since it was built"):
            open_index(tmp_path / "i", encoder=encoder)
        path.write_bytes(whole)


def test_verify_finds_a_byte_that_the_samples_of_a_large_file_miss(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(integrity, "_WHOLE_BYTES", 100_000)
    FlatIndex.build(corpus, tmp_path / "i", FakeEncoder(dimension=2048), "float32")
    path = tmp_path / "i/00000.vectors.npy"
    content = bytearray(path.read_bytes())
    content[10_000] ^= 1
    path.write_bytes(content)
    open_index(tmp_path / "i", encoder=FakeEncoder(dimension=2048), recheck=0)
    with pytest.raises(DataError, match=r"00000.vectors.npy: changed since it was built"):
        verify_index(tmp_path / "i")


def test_the_hash_of_a_spec_is_of_all_but_where_the_model_lies():
    spec = FakeEncoder().spec
    fields = {**vars(spec), "model": "elsewhere"}
    assert EncodingSpec(**fields).hash == spec.hash
    assert EncodingSpec(**{**fields, "query_prompt": "query: "}).hash != spec.hash
    with pytest.raises(ConfigError, match=r"passage_template .*may name"):
        EncodingSpec(**{**fields, "passage_template": "{body}"})


def test_a_spec_changed_in_a_manifest_of_the_first_version_is_one_line(tmp_path, corpus):
    FlatIndex.build(corpus, tmp_path / "i", FakeEncoder())
    path = tmp_path / "i/manifest.json"
    fields = json.loads(path.read_text())
    del fields["checksum"]  # the first version had none
    for old, new in (('"pooling"', '"pool1ng"'), ('"kind": "dense"', '"kind": "lense"')):
        spec = json.loads(json.dumps(fields["spec"]).replace(old, new))
        path.write_text(json.dumps({**fields, "spec": spec}))
        with pytest.raises(DataError, match="its manifest was changed: "):
            open_index(tmp_path / "i", encoder=FakeEncoder())


def test_options_of_another_kind_are_refused(tmp_path, corpus):
    FlatIndex.build(corpus, tmp_path / "i", FakeEncoder())
    with pytest.raises(ConfigError, match="candidates is no option of an index of kind flat"):
        open_index(tmp_path / "i", encoder=FakeEncoder(), candidates=3)
    BM25Index.build(corpus, tmp_path / "words")
    with pytest.raises(ConfigError, match="device is no option of an index of kind bm25"):
        open_index(tmp_path / "words", device="cpu")


def test_every_kind_is_in_the_table():
    for kind, of in KINDS.items():
        assert INDEX_KINDS[kind] == f"{of.__module__}:{of.__name__}"
