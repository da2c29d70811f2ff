"""Retrievers of docs/retrievers.md and scripts/configs/retrievers open, from the paths they name."""

import json
import re
import shutil
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
import yaml

from data.corpus import Corpus
from data.jsonl import write_jsonl
from data.records import Hit, Passage
from retriever_server.encoders.loading import load_encoder
from retriever_server.indexes.bm25 import BM25Index
from retriever_server.indexes.manifest import index_kind
from retriever_server.open_retriever import SHORT_NAMES, open_retriever
from tests.retriever_server.answering import answering
from tests.retriever_server.tiny_encoders import tiny_model

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/retrievers.md").read_text()
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
BLOCKS = [text for text in EXAMPLES if "class_path: my_search" not in text]
FILES = {path.name: path.read_text() for path in sorted((ROOT / "scripts/configs/retrievers").glob("*.yaml"))}
RERANKER = "cross-encoder/ms-marco-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with small indexes, a reranker and hybrid.yaml where the examples look for them."""
    at = tmp_path_factory.mktemp("world")
    rows = [{"id": "1", "title": "Fox", "text": "red fox"}, {"id": "2", "text": "blue sea"}]
    write_jsonl(at / "corpus.jsonl", rows)
    corpus = Corpus(at / "corpus.jsonl")
    BM25Index.build(corpus, at / "runs/atlas/index")
    for kind, vectors in (("flat", "dense"), ("maxsim", "multi")):
        encoder = load_encoder(tiny_model(at / vectors, vectors), device="cpu")
        index_kind(kind).build(corpus, at / "runs/atlas" / kind, encoder)
    for kind in ("dense", "sparse"):
        shutil.copytree(at / "runs/atlas/flat", at / f"runs/promptreps/{kind}-index")
    tiny_model(at / RERANKER, "cross")
    write_jsonl(at / "runs/wiki-18.jsonl", rows)
    shutil.copytree(tiny_model(at / "e5", "dense"), at / "intfloat/e5-base-v2")
    e5 = load_encoder(
        str(at / "intfloat/e5-base-v2"), None, "query: ", "passage: ", "{contents}", device="cpu"
    )
    vectors = np.asarray(e5.encode([passage.contents for passage in corpus], "passage"), np.float32)
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)  # type: ignore[call-arg]
    faiss.write_index(flat, str(at / "runs/e5_Flat.index"))
    (at / "hybrid.yaml").write_text(next(text for text in BLOCKS if text.startswith("# hybrid.yaml")))
    return at


@pytest.mark.parametrize("text", [*BLOCKS, *FILES.values()], ids=[*map(str, range(len(BLOCKS))), *FILES])
def test_every_example_opens_and_searches_what_is_here(text, places, monkeypatch):
    monkeypatch.chdir(places)
    (places / "mine.yaml").write_text(text)
    opened = open_retriever("mine.yaml")
    if not opened.waits:
        [hits] = opened.search(["fox"], 2)
        assert {"1"} <= {hit.passage.id for hit in hits} and hits[0].generation == opened.generation
    opened.close()


def test_every_class_with_a_short_name_is_in_the_table():
    assert {*re.findall(r"(?m)^\| `(\w+)` \|", PAGE)} >= {*SHORT_NAMES}


def test_the_recipe_names_what_the_commands_build():
    recipe = yaml.safe_load((ROOT / "scripts/configs/atlas.yaml").read_text())
    named = re.findall(r"(?m)^retriever: (\S+)$", PAGE)
    built = re.findall(r"(?m)^sleuth index --corpus \S+ --out (\S+)", PAGE)
    assert recipe["retriever"] in named and len(named) == 6
    for place in named:
        assert (ROOT / place).is_file() if place.endswith(".yaml") else place in built


def test_the_class_of_ones_own_runs_against_an_endpoint(tmp_path, monkeypatch):
    [code] = re.findall(r"```python\n# my_search.py\n(.*?)```", PAGE, re.S)
    [text] = re.findall(r"```yaml\n(class_path: my_search.*?)```", PAGE, re.S)
    (tmp_path / "my_search.py").write_text(code)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "my_search", raising=False)
    source = {"title": "Fox", "text": "red fox", "metadata": {"year": 1999}}
    found = {"responses": [{"hits": {"hits": [{"_id": "7", "_score": 2.5, "_source": source}]}}] * 2}
    with answering(_msearch=lambda lines: (200, found)) as server:
        (tmp_path / "mine.yaml").write_text(text.replace("http://127.0.0.1:9200", server.url))
        opened = open_retriever(str(tmp_path / "mine.yaml"))
        where = {"lang": "de", "year": {"gte": 1990}, "kind": {"in": ["a", "b"]}}
        hit = Hit(Passage("7", "red fox", "Fox", {"year": 1999}), 2.5, "elasticsearch(wiki)")
        assert opened.waits and opened.search(["fox", "sea"], 3, where) == [[hit], [hit]]
        [(_, lines, headers)] = server.seen
    assert headers["content-type"] == "application/x-ndjson" and len(lines) == 4
    assert lines[0] == {"index": "wiki"} and lines[1]["size"] == 3
    assert "fox" in json.dumps(lines[1]) and "sea" in json.dumps(lines[3])
    assert lines[1]["query"]["bool"]["filter"] == [
        {"term": {"metadata.lang": "de"}},
        {"range": {"metadata.year": {"gte": 1990}}},
        {"terms": {"metadata.kind": ["a", "b"]}},
    ]
