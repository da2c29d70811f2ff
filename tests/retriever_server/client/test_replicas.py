"""Several servers as one: the load is shared, a dead or hanging one is passed over, and comes back."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from data.errors import ConfigError, RetrieverRefused, RetrieverUnavailable
from retriever_server.client import pool
from retriever_server.client.search_client import SearchClient, connect
from retriever_server.client.wire import parse_hits
from retriever_server.open_retriever import open_retriever
from retriever_server.retrievers.remote import Remote
from tests.retriever_server.client.test_http import FAULTS
from tests.retriever_server.client.test_search_client import FlakyServer, echoed, texts

FAILURES = {"503": (503, {}, "stopping"), "hangs": 9.0, **FAULTS}


def with_servers(servers, act, deadline_seconds=20.0):
    """Return what `act(client, backend)` gives beside these servers as replicas of one another."""

    async def run():
        async with AsyncExitStack() as stack:
            for server in servers:
                await stack.enter_async_context(server.running())
            remote = Remote(",".join(server.url for server in servers), deadline_seconds)
            async with SearchClient(remote, max_batch=1) as client:
                return await act(client, remote._http)

    return asyncio.run(run())


async def ask(client, *queries):
    return [texts(hits) for hits in await asyncio.gather(*(client.search(query, 1) for query in queries))]


def test_the_load_is_shared():
    servers = [FlakyServer(), FlakyServer(), FlakyServer()]

    async def act(client, _):
        assert await ask(client, *"abcdef") == [[letter] for letter in "abcdef"]
        for letter in "ghi":  # one after the other, too
            await ask(client, letter)

    with_servers(servers, act)
    assert [len(server.requests) for server in servers] == [3, 3, 3]


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_what_one_cannot_answer_another_does(failure):
    servers = [FlakyServer(failure), FlakyServer()]

    async def act(client, backend):
        assert await ask(client, "a") == [["a"]]
        assert [server.failures for server in backend.pool.servers] == [1, 0]
        await ask(client, "b")

    with_servers(servers, act, deadline_seconds=1.0 if failure == 9.0 else 20.0)
    assert [len(server.requests) for server in servers] == [1, 2]  # it is asked no more


def test_one_that_is_back_is_asked_again(monkeypatch):
    monkeypatch.setattr(pool, "FIRST_PAUSE_SECONDS", 0.05)
    servers = [FlakyServer(FAILURES["503"]), FlakyServer()]

    async def act(client, backend):
        await ask(client, "a")
        await asyncio.sleep(0.1)
        await ask(client, "b", "c")
        return backend.pool.servers[0].failures

    assert with_servers(servers, act) == 0
    assert [len(server.requests) for server in servers] == [2, 2]


def test_all_that_are_out_are_asked_again_until_the_deadline(monkeypatch):
    monkeypatch.setattr(pool, "FIRST_PAUSE_SECONDS", 0.02)
    servers = [FlakyServer(*[FAILURES["503"]] * 2), FlakyServer(*[FAILURES["503"]] * 2)]

    async def act(client, _):
        return await ask(client, "a")

    assert with_servers(servers, act) == [["a"]]
    servers = [FlakyServer(*[FAILURES["503"]] * 99) for _ in "ab"]
    with pytest.raises(RetrieverUnavailable, match=r"none of 2 replicas answered within .* answered 503"):
        with_servers(servers, act, deadline_seconds=3.0)  # time for an answer on a busy machine


def test_a_refusal_is_no_reason_to_ask_another():
    servers = [FlakyServer((403, {}, "no")), FlakyServer()]

    async def act(client, _):
        with pytest.raises(RetrieverRefused, match="403"):
            await ask(client, "a")

    with_servers(servers, act)
    assert not servers[1].requests


def test_urls_with_commas_are_replicas_wherever_a_retriever_is_named():
    servers = [FlakyServer(FAILURES["503"]), FlakyServer()]

    async def run():
        async with servers[0].running(), servers[1].running():
            both = f"{servers[0].url}, {servers[1].url}/retrieve"
            async with connect(both) as client:
                assert client.waits
                assert texts(await client.search("a", 1)) == ["a"]
            retriever = open_retriever(both)
            rankings = await asyncio.to_thread(retriever.search, ["b"], 1)
            await asyncio.to_thread(retriever.close)
            return rankings

    assert [texts(hits) for hits in asyncio.run(run())] == [["b"]]
    assert parse_hits(echoed(["b"]), "")  # what they answered
    with pytest.raises(ConfigError, match="must be one or more different URLs"):
        connect("http://a,http://a")
    with pytest.raises(ConfigError, match="'ftp://b': must be like"):
        connect("http://a,ftp://b")
