"""A flipped bit, in whatever file of an index or in its corpus, is noticed or changes nothing."""

import random

import pytest

from data.corpus import Corpus
from data.errors import SleuthError
from data.jsonl import write_jsonl
from retriever_server.indexes.base import open_index
from retriever_server.indexes.manifest import index_kind
from tests.retriever_server.tiny_encoders import WORDS, FakeEncoder
from tests.samples import quick

RNG = random.Random(5)
ROWS = [
    {"id": str(i), "text": " ".join(RNG.choices(WORDS, k=6)), "metadata": {"n": i, "even": i % 2 == 0}}
    for i in range(60)
]
QUERIES = [" ".join(RNG.choices(WORDS, k=3)) for _ in range(4)]
VECTORS = {"bm25": None, "flat": "dense", "ann": "dense", "inverted": "sparse", "maxsim": "multi"}


def found(folder, encoder):
    index = open_index(folder, **({"encoder": encoder, "recheck": 0} if encoder else {}))
    wheres = (None, {"even": True}, {"n": {"lt": 20}})
    rankings = [index.search(QUERIES, 5, where) for where in wheres]
    return (
        rankings,
        [index.corpus.get(str(i)) for i in range(60)],
        index.corpus.positions(["3", "70"]).tolist(),
    )


@pytest.mark.parametrize("kind", quick(["bm25"], VECTORS))
def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path, kind):
    write_jsonl(tmp_path / "corpus.jsonl", ROWS)
    encoder = FakeEncoder(VECTORS[kind]) if VECTORS[kind] else None
    encoded = (encoder, "int8") if encoder else ()
    index_kind(kind).build(Corpus(tmp_path / "corpus.jsonl"), tmp_path / "index", *encoded)
    whole, noticed = found(tmp_path / "index", encoder), 0
    for path in sorted([tmp_path / "corpus.jsonl", *(tmp_path / "index").iterdir()]):
        content = path.read_bytes()
        for at in RNG.sample(range(len(content)), min(len(content), 60)):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << RNG.randrange(8)]) + content[at + 1 :])
            try:
                assert found(tmp_path / "index", encoder) == whole, (path.name, at)
            except SleuthError:
                noticed += 1
        path.write_bytes(content)
    assert noticed > 100
