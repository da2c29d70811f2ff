"""The style that a retriever was trained in lies in its model and index; who asks in another is refused."""

import pytest

from data.corpus import Corpus
from data.errors import ConfigError
from data.jsonl import read_jsonl, write_jsonl
from retriever_server.encoders.loading import load_encoder, saved_spec
from retriever_server.encoders.spec import EncodingSpec
from retriever_server.indexes.flat import FlatIndex
from retriever_server.open_retriever import open_retriever
from retriever_server.retrievers.cache import Cached
from retriever_server.training import run as training
from rl.config import ProtocolConfig
from scripts import __main__ as sleuth
from scripts.wiring import open_agent
from tests.retriever_server.running import running_server
from tests.retriever_server.training.recipes import recipe, world
from tests.scripts.test_evaluate import evaluate, folder, scripted  # noqa: F401 (fixtures)


@pytest.fixture(scope="module")
def styled(tmp_path_factory):
    """A model trained on queries of the style `question`, and its index."""
    place = world(tmp_path_factory.mktemp("styled"))
    rows = [
        {**row, "provenance": {"style": "question"} if i % 2 else {}}
        for i, row in enumerate(read_jsonl(place / "examples.jsonl"))
    ]
    write_jsonl(place / "examples.jsonl", rows)
    training.train(recipe(place, place / "run", steps=1))
    encoder = load_encoder(str(place / "run" / "model"))
    FlatIndex.build(Corpus(place / "corpus.jsonl"), place / "index", encoder)
    return place


def test_training_keeps_the_style_of_its_examples_with_the_model_and_the_index(styled):
    spec = saved_spec(str(styled / "run" / "model"))
    assert spec and spec.query_style == "question"
    index = open_retriever(str(styled / "index"))
    assert index.query_style() == Cached(index).query_style() == "question"
    with pytest.raises(ConfigError, match=r"another spec \(query_style: 'question', here 'query'\)"):
        load_encoder(str(styled / "run" / "model"), query_style="query")


def test_a_spec_of_before_means_the_query_alone_and_keeps_its_hash():
    assert EncodingSpec("m", "dense", "f", 4).hash == "f19db6199f171943"
    assert EncodingSpec("m", "dense", "f", 4).query_style == "query"


def test_examples_of_two_styles_are_refused(styled, tmp_path):
    rows = list(read_jsonl(styled / "examples.jsonl"))
    rows[0]["provenance"] = {"style": "history"}
    write_jsonl(tmp_path / "examples.jsonl", rows)
    train = [{"examples": str(tmp_path / "examples.jsonl"), "corpus": str(styled / "corpus.jsonl")}]
    with pytest.raises(ConfigError, match=r"train: several styles of queries \(history, question\)"):
        training.train(recipe(styled, tmp_path / "run", train=train))


def opened(folder, retriever, style=None):  # noqa: F811
    return open_agent(str(folder / "policy"), retriever, ProtocolConfig(query_style=style)).agent.protocol


def test_an_agent_takes_the_style_of_its_retriever_and_no_other(folder, styled):  # noqa: F811
    assert opened(folder, str(styled / "index")).query_style == "question"
    assert opened(folder, str(styled / "index"), "question").query_style == "question"
    with pytest.raises(ConfigError, match=r"protocol.query_style = 'query': .*index is to be asked in the"):
        opened(folder, str(styled / "index"), "query")
    assert opened(folder, str(folder / "index"), "history").query_style == "history"  # BM25 learned no words
    assert opened(folder, "none").query_style == "query"


@pytest.mark.slow
def test_over_http_the_server_says_it(folder, styled, scripted, tmp_path, capsys):  # noqa: F811
    with running_server(styled / "index") as server:
        assert opened(folder, server.url).query_style == "question"
        status = evaluate(folder, tmp_path, "--protocol.query_style", "history", retriever=server.url)
    assert status == 2
    said = capsys.readouterr().err
    assert f"protocol.query_style = 'history': {server.url} is to be asked in the style 'question'" in said


def test_an_index_says_the_style_of_a_model_from_elsewhere(styled, tmp_path):
    argv = ["index", "--encoder", str(styled / "run" / "model"), "--corpus", str(styled / "corpus.jsonl")]
    assert sleuth.main([*argv, "--out", str(tmp_path / "a"), "--query_style", "history"]) == 2
    (styled / "run" / "model" / "encoding_spec.json").rename(tmp_path / "kept.json")
    try:
        assert sleuth.main([*argv, "--out", str(tmp_path / "b"), "--query_style", "history"]) == 0
        assert open_retriever(str(tmp_path / "b")).query_style() == "history"
    finally:
        (tmp_path / "kept.json").rename(styled / "run" / "model" / "encoding_spec.json")
