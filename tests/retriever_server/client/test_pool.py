"""The pool of servers, with servers that answer as they are told: who is asked, and who is started again."""

import asyncio
import time
from pathlib import Path

import pytest

from data.errors import EngineError
from retriever_server.client import pool
from retriever_server.client.pool import Server, ServerLost, ServerPool


class Process:
    """A process that notes when it is started, and ends when it is told."""

    name, log = "fake-0", Path("fake.log")

    def __init__(self):
        self.starts, self.says = 0, "exit status 1: never started"
        self.stops = []

    def restart(self):
        self.starts, self.says = self.starts + 1, None
        return "http://fake"

    def ended(self):
        return self.says

    def stop(self, seconds):
        self.stops.append(seconds)
        self.says = "exit status 0: stopped"


class Told(Server):
    """A server whose health is that of its process, or of `well`."""

    well = True

    async def get(self, path):
        if not self.well or (self.process and self.process.says):
            raise ServerLost(f"{self.name}{path}: unwell")


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(pool, "HEALTH_EVERY_SECONDS", 0.01)
    monkeypatch.setattr(pool, "FIRST_PAUSE_SECONDS", 0.01)


def run(servers, act, **options):
    async def live():
        tested = ServerPool("test", servers, 5.0, **options)
        try:
            return await act(tested)
        finally:
            await tested.close(3)

    return asyncio.run(live())


async def until(there):
    end = time.monotonic() + 10
    while not there():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(("steady_seconds", "starts"), [(99.0, 3), (0.0, 6)])
def test_restarts_count_in_a_row_which_a_steady_time_ends(steady_seconds, starts, monkeypatch):
    monkeypatch.setattr(pool, "STEADY_SECONDS", steady_seconds)
    process = Process()
    server = Told("", process)

    async def act(tested):
        await tested.start()
        for _ in range(5):
            process.says = "exit status 1: died"
            await until(lambda: server.given_up or not server.live)
            await until(lambda: server.given_up or server.live)
        return server.given_up

    given_up = run([server], act, max_restarts=2)
    assert process.starts == starts and bool(given_up) == (starts == 3)
    assert process.stops[-1] == 3  # `close` ends it


def test_one_that_cannot_catch_up_is_not_asked_and_is_tried_again():
    servers, tried = [Told("http://a"), Told("http://b")], []

    async def catch_up(server):
        tried.append(server.url)
        if server.url == "http://a" and tried.count("http://a") < 3:
            raise EngineError("no new weights")

    async def act(tested):
        starting = asyncio.ensure_future(tested.start())
        await until(lambda: servers[1].live)
        asked = [await tested.choose(n) for n in range(3)] if not servers[0].live else [servers[1]]
        await starting
        return asked

    assert {server.url for server in run(servers, act, catch_up=catch_up)} == {"http://b"}
    assert tried.count("http://a") == 3 and tried.count("http://b") == 1


def test_a_key_stays_with_its_server_until_that_is_down_and_loads_follow():
    servers = [Told("http://a"), Told("http://b")]

    async def act(tested):
        await tested.start()
        first = await tested.choose("k")
        assert [await tested.choose(n) for n in range(3)] == [servers[1], servers[0], servers[1]]
        assert await tested.choose("k") is first is servers[0]
        servers[0].well = False
        tested.mark_down(servers[0], "broke off")
        assert await tested.choose("k") is servers[1]
        assert [server.load for server in servers] == [1, 3]
        tested.release("k")
        assert [server.load for server in servers] == [1, 2]

    run(servers, act)


def test_on_all_leaves_out_those_that_fail_and_says_when_all_did():
    servers = [Told("http://a"), Told("http://b")]

    async def act(tested):
        async def answer(server):
            if server is servers[0]:
                raise ServerLost("a: broke off")
            return "yes"

        async def refuse(server):
            raise EngineError(f"{server.url}: refused")

        await tested.start()
        servers[0].well = False
        assert await tested.on_all(answer) == {servers[1]: "yes"}
        servers[1].well = False
        with pytest.raises(EngineError, match=r"none of 2 servers is left: .*http://b: refused"):
            await tested.on_all(refuse)

    run(servers, act)
