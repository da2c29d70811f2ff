"""The client: batches, deadlines, retries and errors, against a server that misbehaves on purpose."""

import asyncio
import json
import re
import socket
import time
from contextlib import asynccontextmanager, contextmanager
from itertools import count
from types import SimpleNamespace

import httpx  # noqa: F401  # the first import takes part of a short deadline
import pytest

from data.errors import (
    ConfigError,
    DataError,
    RetrieverError,
    RetrieverRefused,
    RetrieverTimeout,
    RetrieverUnavailable,
)
from data.records import Hit, Passage
from retriever_server.client.http import Http
from retriever_server.client.search_client import SearchClient, connect
from retriever_server.client.wire import render_hits
from retriever_server.retriever import Retriever
from retriever_server.retrievers.remote import Remote


class Echo(Retriever):
    """Finds one passage a query, the query itself; records the batches."""

    generation = "echo"

    def __init__(self, failure: Exception | None = None) -> None:
        self.batches: list[list[str]] = []
        self.failure = failure

    def search(self, queries, k):
        self.batches.append(list(queries))
        if self.failure:
            raise self.failure
        return [[Hit(Passage(str(k), query), 1.0, "echo")] for query in queries]


def texts(hits: list[Hit]) -> list[str]:
    return [hit.passage.text for hit in hits]


class FlakyServer:
    """Answers each request with the next (status, headers, body or seconds to wait) of a script.

    Past the end of the script it echoes the queries, as a healthy server.
    """

    def __init__(self, *script) -> None:
        self.script, self.requests, self.url = list(script), [], ""

    @asynccontextmanager
    async def running(self):
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader, writer) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length:")[1].split("\r\n")[0])
        request = json.loads(await reader.readexactly(length))
        self.requests.append(request)
        answer = self._answer(request)
        if isinstance(answer, float):
            await asyncio.sleep(answer)
        else:
            status, headers, body = answer
            body = body() if callable(body) else body
            body = body if isinstance(body, bytes | str) else json.dumps(body)
            body = body.encode() if isinstance(body, str) else body
            lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}", "connection: close"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        writer.close()

    def _answer(self, request):
        step = self.script.pop(0) if self.script else None
        if callable(step):
            step = step(request)
        return step if step is not None else (200, {}, echoed(request["queries"]))


def echoed(queries: list[str]) -> dict:
    return render_hits([[Hit(Passage("1", q), 1.0, "g")] for q in queries], "g", True)


@contextmanager
def a_look_takes_100_seconds():
    """For the client, each time it looks at its clock: deadlines pass however fast or busy the machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retriever_server.client.http.time", SimpleNamespace(monotonic=count(0, 100).__next__))
        yield


def ask_server(server: FlakyServer, *queries: str, deadline_seconds: float = 10.0) -> list:
    """The hits or the error of each query, asked at the same time."""

    async def run():
        async with (
            server.running(),
            SearchClient(Remote(server.url, deadline_seconds)) as client,
        ):
            asked = (client.search(query, 3) for query in queries)
            return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(run())


def test_queries_asked_together_travel_together_each_once():
    retriever = Echo()

    async def run():
        async with SearchClient(retriever) as client:
            return await asyncio.gather(*(client.search(q, 2) for q in "abcab"))

    assert [texts(hits) for hits in asyncio.run(run())] == [["a"], ["b"], ["c"], ["a"], ["b"]]
    assert retriever.batches == [["a", "b", "c"]]


def test_batches_are_cut_at_max_batch_and_by_k():
    retriever = Echo()

    async def run():
        async with SearchClient(retriever, max_batch=3) as client:
            asked = [client.search(str(i), k) for k in (1, 2) for i in range(7)]
            return await asyncio.gather(*asked)

    hits = asyncio.run(run())
    assert sorted(len(batch) for batch in retriever.batches) == [1, 1, 3, 3, 3, 3]
    assert [h[0].passage.id for h in hits] == ["1"] * 7 + ["2"] * 7
    assert [h[0].passage.text for h in hits] == list("0123456") * 2


def test_over_http_too():
    server = FlakyServer()
    results = ask_server(server, "a", "b", "a")
    assert [texts(hits) for hits in results] == [["a"], ["b"], ["a"]]
    assert [request["queries"] for request in server.requests] == [["a", "b"]]
    assert server.requests[0]["topk"] == 3


def test_waiters_do_not_share_one_list():
    async def run():
        async with SearchClient(Echo()) as client:
            return await asyncio.gather(client.search("a", 1), client.search("a", 1))

    first, second = asyncio.run(run())
    first.clear()
    assert texts(second) == ["a"]


def test_cancelling_one_waiter_leaves_the_others():
    async def run():
        server = FlakyServer()
        async with server.running(), SearchClient(Remote(server.url)) as client:
            tasks = [asyncio.ensure_future(client.search("same", 1)) for _ in range(3)]
            await asyncio.sleep(0)
            tasks[0].cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    cancelled, *others = asyncio.run(run())
    assert isinstance(cancelled, asyncio.CancelledError)
    assert [texts(hits) for hits in others] == [["same"], ["same"]]


def test_retry_after_is_honoured():
    server = FlakyServer((503, {"retry-after": "1"}, "busy"))
    start = time.monotonic()
    assert texts(ask_server(server, "a")[0]) == ["a"]
    assert time.monotonic() - start >= 1
    server = FlakyServer((503, {"retry-after": "3600"}, "busy"))
    [error] = ask_server(server, "a")
    assert isinstance(error, RetrieverUnavailable)
    assert len(server.requests) == 1  # longer than the deadline: no use to wait for it


def test_a_server_that_hangs_is_a_timeout():
    [error] = ask_server(FlakyServer(60.0), "a", deadline_seconds=0.2)
    assert isinstance(error, RetrieverTimeout)
    assert re.search(r"no answer within \d+\.\d s", str(error))


def test_a_dead_server_is_unavailable_within_the_deadline():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"

    async def run():
        async with connect(url, deadline_seconds=350) as client:
            await client.search("a", 1)

    with (
        a_look_takes_100_seconds(),
        pytest.raises(RetrieverUnavailable, match=rf"{url}: gave up after .* s.*ConnectError"),
    ):
        asyncio.run(run())


def refuse_bad(request):
    return (422, {}, {"detail": "bad one"}) if "bad" in request["queries"] else None


def test_one_bad_query_does_not_fail_the_others_of_its_batch():
    queries = [str(i) for i in range(20)]
    queries[13] = "bad"
    server = FlakyServer(*[refuse_bad] * 40)
    results = ask_server(server, *queries)
    error = results.pop(13)
    assert isinstance(error, RetrieverRefused) and "422" in str(error) and "bad one" in str(error)
    assert [texts(hits) for hits in results] == [[q] for q in queries if q != "bad"]
    assert len(server.requests) < 12  # halving, not one request a query


def test_a_refused_address_is_not_asked_again():
    server = FlakyServer((404, {}, {"detail": "Not Found"}))
    results = ask_server(server, "a", "b", "c")
    assert all(isinstance(error, RetrieverRefused) for error in results)
    assert len(server.requests) == 1


@pytest.mark.parametrize("wrong_rows", [True, False])
def test_a_failing_retriever_in_process_is_an_error(wrong_rows):
    class Short(Echo):
        def search(self, queries, k):
            return []

    retriever = Short() if wrong_rows else Echo(ZeroDivisionError("oops"))

    async def run():
        async with SearchClient(retriever) as client:
            await client.search("a", 1)

    expected = "0 rows for 1 queries" if wrong_rows else "search failed: ZeroDivisionError: oops"
    with pytest.raises(RetrieverError, match=expected):
        asyncio.run(run())


def test_a_query_that_cannot_be_searched_is_an_error_in_one_line(caplog):
    async def run():
        async with SearchClient(Echo(DataError("a.png: a broken image"))) as client:
            await client.search("a", 1)

    with pytest.raises(RetrieverError, match=r"^a\.png: a broken image$"):
        asyncio.run(run())
    assert not caplog.records  # no traceback of what is the caller's to mend


def test_one_client_serves_successive_event_loops(tmp_path):
    server = FlakyServer()
    remote = Remote("http://127.0.0.1:1")
    http = remote._http
    clients = SearchClient(remote), SearchClient(Echo())

    async def run(query: str):
        async with server.running():
            http.url = server.url
            return [texts(await client.search(query, 1)) for client in clients]

    for query in "abc":  # never closed: each loop takes its connections with it
        assert asyncio.run(run(query)) == [[query], [query]]
    assert len(http._sessions) == 1  # and is forgotten when the next one comes


def test_closing_fails_those_who_wait_and_the_client_can_be_used_again():
    async def run():
        server = FlakyServer(60.0)
        async with server.running():
            client = SearchClient(Remote(server.url))
            waiting = asyncio.ensure_future(client.search("a", 1))
            while not server.requests:  # until it is on its way
                await asyncio.sleep(0.001)
            await client.close()
            with pytest.raises(RetrieverUnavailable, match="closed"):
                await waiting
            hits = await client.search("b", 1)
            await client.close()
            return hits

    assert texts(asyncio.run(run())) == ["b"]


@pytest.mark.parametrize("spec", ["nowhere", "localhost:8000", "http://", "http://x:y"])
def test_what_is_neither_url_nor_index_is_refused(spec):
    with pytest.raises(ConfigError, match=r"retriever .*: must be"):
        connect(spec)


def test_a_url_may_end_in_retrieve():
    assert Http("http://h:1/retrieve").url == Http("http://h:1/").url == "http://h:1"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Http("http://h:1", deadline_seconds=0),
        lambda: SearchClient(Echo(), max_batch=0),
    ],
)
def test_wrong_settings_are_refused(make):
    with pytest.raises(ConfigError, match=r"must be >"):
        make()
