"""A corpus made of another keeps all that its passages say: metadata, images and files of other kinds."""

import os
from dataclasses import replace

import pytest

from data.corpus import Corpus
from data.formats.benchmarks import benchmark_passages
from data.jsonl import write_jsonl
from retriever_server.encoders.spec import EncodingSpec
from retriever_server.training.convert import convert_from
from retriever_server.training.dev import DevSet
from retriever_server.training.expansion import expand
from retriever_server.training.recipe import DevConfig


@pytest.fixture
def source(tmp_path):
    """A folder of BEIR's whose corpus.jsonl is also ours."""
    folder = tmp_path / "in"
    rows = [
        {"_id": str(n), "id": str(n), "title": f"T{n}", "text": f"text {n}", "image": f"pages/{n}.png"}
        | {"metadata": {"expansion": f"unique{n}", "year": 1900 + n}}
        for n in range(30)
    ]
    write_jsonl(folder / "corpus.jsonl", rows)
    write_jsonl(folder / "queries.jsonl", [{"_id": "q", "text": "unique3"}])
    (folder / "qrels").mkdir()
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq\t3\t1\n")
    return folder


def dev(source, out):
    config = DevConfig(str(source / "queries.jsonl"), str(source / "qrels" / "train.tsv"), passages=10)
    return DevSet(config, str(source / "corpus.jsonl"), out).corpus


def benchmark(source, out):
    write_jsonl(out / "corpus.jsonl", benchmark_passages(str(source), out))
    return Corpus(out / "corpus.jsonl")


def expanded(source, out):
    return Corpus(
        expand(Corpus(source / "corpus.jsonl"), lambda ps: ["more"] * len(ps), out / "corpus.jsonl")
    )


def converted(source, out):
    return convert_from("beir", source, out).corpus


@pytest.mark.parametrize("make", [dev, benchmark, expanded, converted])
def test_a_derived_corpus_loses_no_field(source, tmp_path, make):
    made = make(source, tmp_path / "deep" / "out")
    whole = Corpus(source / "corpus.jsonl")
    assert len(made) == len(whole) if make is not dev else 10 <= len(made) < 30
    for passage in made:
        before = whole.get(passage.id)
        assert before is not None
        if make is expanded:
            before = replace(before, metadata={**before.metadata, "expansion": "more"})
        assert replace(passage, image=os.path.normpath(passage.image)) == before


def test_a_dev_sample_has_what_the_encoder_reads(source, tmp_path):
    spec = EncodingSpec("m", "dense", "f", 4, passage_template="{title}\n{text} {expansion}")
    passage = dev(source, tmp_path / "out").get("3")
    assert passage is not None and spec.render_text(passage) == "T3\ntext 3 unique3"
