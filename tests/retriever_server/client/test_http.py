"""Answers of a server that are none: retried, never passed on; one bad query fails alone."""

import asyncio
import gzip

import pytest

from data.errors import RetrieverRefused, RetrieverUnavailable
from retriever_server.client import http as http_of_client
from retriever_server.client.http import Http
from retriever_server.client.search_client import SearchClient
from retriever_server.retrievers.remote import Remote
from tests.retriever_server.client.test_search_client import (
    Echo,
    FlakyServer,
    a_look_takes_100_seconds,
    ask_server,
    echoed,
    texts,
)


def answered(score="1.0", document='"id": "1", "text": "a"', hits=1) -> str:
    row = ", ".join([f'{{"document": {{{document}}}, "score": {score}}}'] * hits)
    return f'{{"result": [[{row}]]}}'


RIGHT = answered().encode()
FAULTS = {
    "500": (500, {}, {"detail": "boom"}),
    "503": (503, {}, "not json"),
    "429": (429, {}, {}),
    "204": (204, {}, ""),
    "not JSON": (200, {}, "not json"),
    "no rows": (200, {}, {"result": "?"}),
    "too few rows": (200, {}, {"result": []}),
    "too many rows": (200, {}, lambda: echoed(["a", "b"])),
    "closes the connection": 0.0,
    "HTML": (200, {"content-type": "text/html"}, "<html>busy</html>"),
    "another type": (200, {"content-type": "text/html; charset=utf-8"}, RIGHT),
    "cut short": (200, {}, RIGHT[:-5]),
    "nested without end": (200, {}, "[" * 100_000),
    "broken gzip": (200, {"content-encoding": "gzip"}, b"\x1f\x8b\x08\x00 broken"),
    "gzip cut short": (200, {"content-encoding": "gzip"}, gzip.compress(RIGHT)[:-20]),
    "no gzip": (200, {"content-encoding": "gzip"}, RIGHT),
    "an unknown packing": (200, {"content-encoding": "x-rot13"}, b"erfhyg"),
    "a long reply": (200, {}, b" " * 3000),
    "a long reply, packed": (200, {"content-encoding": "gzip"}, gzip.compress(b" " * 1_000_000)),
    "too many hits": (200, {}, answered(hits=4)),
    **{f"score {score}": (200, {}, answered(score)) for score in ("NaN", "Infinity", "-Infinity", "1e999")},
    "score of text": (200, {}, answered('"1"')),
    "no id": (200, {}, answered(document='"text": "a"')),
    "an empty id": (200, {}, answered(document='"id": "", "text": "a"')),
    "NaN beside": (200, {}, answered(document='"id": "1", "text": "a", "metadata": {"x": NaN}')),
    "half a surrogate pair": (200, {}, answered(document='"id": "1", "text": "\\ud800"')),
    "Retry-After of no number": (503, {"retry-after": "\u00b2"}, ""),
}


@pytest.mark.parametrize("failure", FAULTS.values(), ids=FAULTS)
def test_what_may_pass_is_retried_and_never_an_empty_result(failure, monkeypatch):
    monkeypatch.setattr(http_of_client, "_MAX_REPLY_BYTES", 2000)
    server = FlakyServer(failure, failure)
    assert [texts(hits) for hits in ask_server(server, "a")] == [["a"]]
    assert len(server.requests) == 3
    with a_look_takes_100_seconds():  # one at the start, two an attempt
        [error] = ask_server(FlakyServer(*[failure] * 50), "a", deadline_seconds=350)
    assert isinstance(error, RetrieverUnavailable)
    assert "http://127.0.0.1:" in str(error) and "2 attempts" in str(error)


def test_an_answer_too_long_for_many_queries_is_asked_for_in_halves(monkeypatch):
    monkeypatch.setattr(http_of_client, "_MAX_REPLY_BYTES", 500)
    server = FlakyServer()
    assert [texts(hits) for hits in ask_server(server, *"abcdefgh")] == [[letter] for letter in "abcdefgh"]
    assert [len(request["queries"]) for request in server.requests][:3] == [8, 4, 4]


def test_many_queries_go_in_several_requests(monkeypatch):
    monkeypatch.setattr(http_of_client, "_MOST_QUERIES", 4)
    monkeypatch.setattr(http_of_client, "_MOST_HITS", 9)

    async def run(k: int):
        async with (server := FlakyServer()).running():
            http = Http(server.url)
            outcomes = await http.ask(list("abcdefghi"), k)
            await http.close()
            return "".join(texts(hits)[0] for hits in outcomes), [len(r["queries"]) for r in server.requests]

    assert asyncio.run(run(1)) == ("abcdefghi", [4, 4, 1])
    assert asyncio.run(run(3)) == ("abcdefghi", [3, 3, 3])
    assert asyncio.run(run(100)) == ("abcdefghi", [1] * 9)


@pytest.mark.parametrize("in_process", [True, False])
def test_a_query_that_is_no_unicode_fails_alone(in_process):
    class Strict(Echo):
        def search(self, queries, k):
            [query.encode() for query in queries]
            return super().search(queries, k)

    async def run():
        server = FlakyServer()
        async with server.running():
            backend = Strict() if in_process else Remote(server.url)
            async with SearchClient(backend) as client:
                asked = (client.search(query, 1) for query in ("a", "half \ud800 a pair", "b"))
                return await asyncio.gather(*asked, return_exceptions=True)

    first, error, last = asyncio.run(run())
    assert (texts(first), texts(last)) == (["a"], ["b"])
    assert isinstance(error, RetrieverRefused) and "half a surrogate pair" in str(error)


def test_nor_does_it_fail_the_others_of_a_backend_that_is_asked_itself():
    async def run():
        server = FlakyServer()
        async with server.running():
            http = Http(server.url)
            outcomes = await http.ask(["a", "\udfff", "b"], 1)
            await http.close()
            return outcomes

    first, error, last = asyncio.run(run())
    assert (texts(first), texts(last)) == (["a"], ["b"])
    assert isinstance(error, RetrieverRefused) and "half a surrogate pair" in str(error)
