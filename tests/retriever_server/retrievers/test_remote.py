"""Remote against a small real server that says what it was asked."""

import asyncio
import threading

import httpx
import pytest

from data.corpus import Corpus
from data.errors import ConfigError, RetrieverError, RetrieverRefused, RetrieverTimeout, RetrieverUnavailable
from data.jsonl import write_jsonl
from data.records import Hit
from retriever_server.client.search_client import connect
from retriever_server.indexes.bm25 import BM25Index
from retriever_server.retrievers.cache import Cached
from retriever_server.retrievers.remote import Remote
from retriever_server.server.app import create_app
from tests.retriever_server.answering import answering, echo
from tests.retriever_server.running import serving


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "key").write_text("s3cret\n")
    return str(tmp_path / "key")


def test_remote_finds_what_the_server_finds_and_sends_its_token(secret):
    with answering(retrieve=echo("g1"), healthz=lambda _: (200, {"generation": "g1"})) as server:
        remote = Remote(server.url, token_file=secret)
        assert remote.generation == "g1"
        [[a], [b]] = remote.search(["a", "b"], 2)
        assert (a.passage.text, b.passage.title, a.score, a.generation) == ("about a", "b", 0.5, "g1")
        assert remote.search([], 2) == []
        assert all(headers["authorization"] == "Bearer s3cret" for _, _, headers in server.seen)
        remote.close()


def test_a_server_that_names_no_generation_is_named_by_its_address():
    with answering(retrieve=echo("")) as server:
        remote = Remote(server.url)
        assert remote.generation == f"remote({server.url})"
        assert remote.search(["a"], 1)[0][0].generation == remote.generation
        assert server.paths().count("/healthz") == 1  # it has none: not asked again


def test_a_cache_before_a_server_sees_its_swap(monkeypatch):
    monkeypatch.setattr("retriever_server.retrievers.remote._STALE_SECONDS", 0)
    now = ["g1"]
    routes = {"retrieve": lambda body: echo(now[0])(body), "healthz": lambda _: (200, {"generation": now[0]})}
    with answering(**routes) as server:
        cached = Cached(Remote(server.url))
        assert [cached.search(["a"], 1)[0][0].generation for _ in range(2)] == ["g1", "g1"]
        assert server.paths().count("/retrieve") == 1
        now[0] = "g2"
        assert cached.search(["a"], 1)[0][0].generation == "g2"


def test_filters_travel_by_our_own_search():
    def search(body):
        hit = {"id": "1", "text": "t", "title": "", "metadata": {"y": 1}, "score": 2, "generation": "g"}
        results = [{"hits": [hit], "error": None}, {"hits": [], "error": "encoder failed"}]
        return 200, {"results": results[: len(body["queries"])]}

    with answering(v1__search=search) as server:
        remote = Remote(server.url)
        [[hit]] = remote.search(["a"], 3, {"y": 1})
        assert hit.passage.metadata == {"y": 1}
        assert server.seen[-1][1] == {"queries": ["a"], "top_k": 3, "where": {"y": 1}}
        with pytest.raises(RetrieverError, match="encoder failed"):
            remote.search(["a", "b"], 3, {"y": 1})


def test_a_refused_search_is_not_asked_again():
    with answering(retrieve=lambda _: (422, {"detail": "bad"})) as server:
        with pytest.raises(RetrieverRefused, match=f"{server.url}.*422.*bad"):
            Remote(server.url).search(["a"], 1)
        assert len(server.seen) == 1


@pytest.mark.parametrize(
    "route",
    [
        lambda _: (500, {}),
        lambda _: (200, {"result": "?"}),
        lambda _: threading.Event().wait(2) or (200, {}),
    ],
)
def test_a_failing_server_is_a_typed_error_at_the_deadline(route):
    either = (RetrieverTimeout, RetrieverUnavailable)  # a busy machine may not get to the second attempt
    with answering(retrieve=route) as server, pytest.raises(either, match=server.url):
        Remote(server.url, deadline_seconds=0.5).search(["a"], 1)


@pytest.mark.parametrize("content", [None, "", "two\nlines", "ключ"])
def test_a_key_file_must_hold_one_line(content, tmp_path):
    path = tmp_path / "key"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match="key"):
        Remote("http://127.0.0.1:1", token_file=str(path))


def test_metadata_and_url_travel_over_http_to_every_client_of_ours(tmp_path):
    page = {"url": "https://example.org/oslo", "year": 1999, "tags": ["a", "b"]}
    rows = [{"id": "1", "text": "Oslo lies by the sea", "metadata": page}, {"id": "2", "text": "a red sea"}]
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    index = BM25Index.build(Corpus(tmp_path / "corpus.jsonl"), tmp_path / "index")
    with serving(create_app(index)) as url:
        body = {"queries": ["oslo sea"], "topk": 2, "return_scores": True}
        first, second = httpx.post(f"{url}/retrieve", json=body).json()["result"][0]
        assert (first["document"]["metadata"], first["document"]["url"]) == (page, page["url"])
        assert not {"metadata", "url"} & set(second["document"])
        remote = Remote(url)
        for where, many in ((None, 2), ({"year": {"gte": 1990}}, 1)):
            hits = remote.search(["oslo sea"], 2, where)[0]
            assert [hit.passage.metadata for hit in hits] == [page, {}][:many]
        remote.close()

        async def ask() -> list[Hit]:
            async with connect(url) as client:
                return await client.search("oslo sea", 2)

        assert asyncio.run(ask()) == index.search(["oslo sea"], 2)[0]


def test_a_style_that_a_server_may_have_but_does_not_say_is_warned_of(caplog):
    broken = {"v1__info": lambda _: (500, {"error": "no"})}
    with answering(retrieve=echo("g"), **broken) as server:
        assert Remote(server.url).query_style() is None
    assert "the style in which the retriever is to be asked is not known" in caplog.text
    caplog.clear()
    with answering(retrieve=echo("g")) as server:  # another project's: there is nothing to say
        assert Remote(server.url).query_style() is None
    assert not caplog.records
