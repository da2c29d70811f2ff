"""`sleuth sizes`: its numbers are those of real indexes, and what it did not measure it says so."""

from itertools import islice
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from data.corpus import Corpus
from data.jsonl import write_jsonl
from retriever_server.indexes.bm25 import BM25Index
from retriever_server.indexes.manifest import index_kind
from scripts import __main__ as sleuth
from scripts import sizes
from scripts.sizes import dense_rows, other_rows
from tests.retriever_server.tiny_encoders import FakeEncoder

POOL = Path(__file__).parents[2].parent / "shared" / "data" / "wiki18_pool" / "corpus.jsonl"


def test_the_table_of_twenty_one_million_says_where_sixty_gigabytes_come_from():
    rows = {row.kind: row for row in dense_rows(21_015_324, 768, sample=0) + other_rows(21_015_324, 100)}
    assert rows["flat float32"].disk_bytes == pytest.approx(64.6e9, rel=0.01)
    assert rows["flat int8"].disk_bytes == pytest.approx(16.1e9, rel=0.01)
    assert rows["ann IVF16384,SQ8"].memory_bytes < rows["flat float16"].memory_bytes
    assert all(row.seconds is None for row in rows.values())
    assert {"bm25", "inverted", "maxsim int8"} <= set(rows)


@pytest.mark.slow
@pytest.mark.skipif(not POOL.exists(), reason="needs shared/data")
def test_sizes_are_those_of_real_indexes_within_a_tenth(tmp_path, monkeypatch):
    passages = list(islice(Corpus(POOL), 1000))
    write_jsonl(tmp_path / "c.jsonl", ({"id": p.id, "title": p.title, "text": p.text} for p in passages))
    corpus, words = Corpus(tmp_path / "c.jsonl"), [f"{p.title}\n{p.text}".split() for p in passages]
    mean = sum(map(len, words)) / len(words)
    buckets = {word: crc32(word.encode()) % 512 for line in words for word in line}
    monkeypatch.setattr(sizes, "_SPARSE_TERMS", np.mean([len({buckets[w] for w in line}) for line in words]))
    monkeypatch.setattr(sizes, "_TOKENS_A_WORD", 1)
    expected = {row.kind: row.disk_bytes for row in dense_rows(1000, 64, 0) + other_rows(1000, mean)}
    built = {"bm25": BM25Index.build(corpus, tmp_path / "bm25"), "maxsim int8": None, "inverted": None}
    for kind in expected.keys() - {"bm25", "the corpus itself"}:
        name, _, how = kind.partition(" ")
        vectors, dimension = {"maxsim": ("multi", 128), "inverted": ("sparse", 512)}.get(name, ("dense", 64))
        options = {"factory": how} if name == "ann" else {"dtype": how or "float16"}
        encoder = FakeEncoder(vectors, dimension)
        built[kind] = index_kind(name).build(corpus, tmp_path / kind.replace(" ", "-"), encoder, **options)
    files = {kind: index.manifest.files.items() for kind, index in built.items()}
    real = {kind: sum(n for name, n in of if name.endswith(("npy", "index"))) for kind, of in files.items()}
    real["the corpus itself"] = (tmp_path / "c.jsonl").stat().st_size
    assert real == {kind: pytest.approx(size, rel=0.1) for kind, size in expected.items()}


def test_recall_is_measured_against_the_exact_product():
    rows = {row.kind: row for row in dense_rows(2000, 24, sample=2000)}
    assert set(rows) == {"flat float32", "flat float16", "flat int8", "ann HNSW32"}
    assert rows["flat float32"].recall == 1.0
    assert all(row.recall is not None and row.recall > 0.9 and row.seconds for row in rows.values())


def test_the_command_prints_a_table_and_measures_given_vectors(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    np.save(tmp_path / "v.npy", np.random.default_rng(0).standard_normal((1200, 8)).astype(np.float16))
    options = ["--vectors", str(tmp_path / "v.npy"), "--sample", "1000"]
    assert sleuth.main(["sizes", "--passages", "3000000", *options]) == 0
    said = capsys.readouterr().out
    assert "3,000,000 passages of 100 words, 8 dimensions" in said
    assert "ann IVF8192,SQ8" in said and "not measured" in said and "v.npy" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--passages", "0"], "passages = 0: must be >= 1"),
        (["--passages", "9", "--sample", "5"], "sample = 5: must be 0, or at least 1000"),
        (["--passages", "9", "--vectors", "{}/none.npy"], "none.npy: not a .npy file of vectors"),
        (
            ["--passages", "9", "--vectors", "{}/words.npy"],
            "words.npy: holds <U4 of shape (2000, 3)",
        ),
        (["--passages", "9", "--encoder", "{}"], "holds no config.json, so it is no model"),
    ],
)
def test_wrong_options_are_refused(options, said, tmp_path, capsys):
    np.save(tmp_path / "words.npy", np.full((2000, 3), "word"))
    assert sleuth.main(["sizes", *[option.format(tmp_path) for option in options]]) == 2
    assert said in capsys.readouterr().err
