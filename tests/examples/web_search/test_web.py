"""A paid web search against a small real server that says what it was asked."""

import sys
from importlib.machinery import PathFinder

import pytest

from data.errors import ConfigError, RetrieverRefused
from examples.web_search.web import Web
from retriever_server.open_retriever import open_retriever
from tests.retriever_server.answering import answering


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "key").write_text("s3cret\n")
    return str(tmp_path / "key")


def organic(body):
    results = [
        {"title": f"T{i}", "link": f"http://x/{i}", "snippet": f"{body['q']} {i}"} for i in range(body["num"])
    ]
    return 200, {"organic": [*results, {"title": "no snippet", "link": "http://x"}]}


def test_web_search_speaks_serper_and_is_kept_on_disk(tmp_path, secret):
    with answering(search=organic) as server:
        web = Web(f"{server.url}/search", secret, str(tmp_path / "cache"))
        [[first, second], other] = web.search(["a", "b"], 2)
        assert (first.passage.id, first.passage.title, first.passage.text) == ("http://x/0", "T0", "a 0")
        assert first.score > second.score and first.passage.metadata["url"] == "http://x/0"
        assert other[0].passage.text == "b 0" and first.generation == web.generation
        path, body, headers = server.seen[0]
        assert (path, body["num"], headers["x-api-key"]) == ("/search", 2, "s3cret")
        again = Web(server.url, secret, str(tmp_path / "cache"))
        assert again.search(["b", "a"], 2)[1] == [first, second]
        assert len(server.seen) == 2
        Web(server.url, secret, str(tmp_path / "cache"), max_age_days=0).search(["a"], 2)
        assert len(server.seen) == 3
    assert "s3cret" not in "".join(f.read_text() for f in (tmp_path / "cache").rglob("*.json"))


def test_a_failed_web_search_is_an_error_and_is_not_kept(tmp_path, secret):
    answers = {"a": (200, {"organic": []}), "b": (403, {"message": "Unauthorized."})}
    with answering(search=lambda body: answers[body["q"]]) as server:
        web = Web(server.url, secret, str(tmp_path / "cache"), deadline_seconds=5)
        with pytest.raises(RetrieverRefused, match="403") as caught:
            web.search(["a", "b"], 2)
        assert "s3cret" not in str(caught.value)
        assert web.search(["a"], 2) == [[]]
        assert len(list((tmp_path / "cache").rglob("*.json"))) == 1


def named(tmp_path, secret, name):
    (tmp_path / "web.yaml").write_text(
        f"class_path: {name}\ninit_args: {{url: 'http://127.0.0.1:1', key_file: {secret}, cache: c}}\n"
    )
    return str(tmp_path / "web.yaml")


@pytest.mark.parametrize("name", ["Web", "retriever_server.remote.Web", "examples.web_search.web.Web"])
def test_its_short_name_and_its_old_name_open_where_the_examples_are(name, tmp_path, secret):
    assert open_retriever(named(tmp_path, secret, name)).generation == "web(127.0.0.1:1)"


def test_elsewhere_one_line_says_where_it_is(tmp_path, secret, monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == "examples"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [PathFinder])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no module examples\.web_search\.web .* in Sleuth's repository$"):
        open_retriever(named(tmp_path, secret, "Web"))
