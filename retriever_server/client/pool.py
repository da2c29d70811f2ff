"""Servers that fall out and come back: engines, replicas of a retriever, what Ray places.

The least loaded server that is up is asked. A pool that watches lets one that failed back once its health
check answers and it has caught up with the others; another, after a time that doubles with every failure in a
row. A server that we started is started again when it has ended or hangs, so many times in a row.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from data.errors import ConfigError, EngineError, reason_of
from retriever_server.client.retries import certificates, checked_url
from retriever_server.client.server_process import ServerProcess

_log = logging.getLogger(__name__)

HEALTH_EVERY_SECONDS = 1.0
HEALTH_TIMEOUT_SECONDS = 30.0
"""A server that computes on every core of a CPU may be slow to say that it is well."""
IDLE_SECONDS = 2.0
"""A connection idle for longer is not used again: vLLM closes it after 5 s, maybe under the next request."""
STEADY_SECONDS = 60.0
"""A server that was up for so long may be started again as often as a new one."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
STOP_SECONDS = 15.0


class ServerLost(EngineError):
    """A server broke off, answered 5xx or was marked down: whatever it was asked can be asked elsewhere."""


class Server:
    """One server, its load, and its failures and restarts so far."""

    def __init__(self, url: str, process: ServerProcess | None = None, health: str = "/health") -> None:
        """process: what can start it again. health: the path that says it is well."""
        self.url, self.process, self.health = url, process, health
        self.load = self.asked = 0
        self.failures = self.restarts = 0  # in a row
        self.lives = 0
        """Times it was opened: one that was started again knows nothing of what it was told before."""
        self.down_until, self.since = 0.0, time.monotonic()
        self.reason = self.given_up = ""
        """The reason why it is down, or is started no more."""
        self._lost: asyncio.Future[None] | None = None
        self._http: Any = None

    @property
    def name(self) -> str:
        """Its name in messages."""
        return self.process.name if self.process else self.url

    @property
    def live(self) -> bool:
        """True while it may be asked."""
        return time.monotonic() >= self.down_until

    def open(self) -> None:
        """Let it take requests in this event loop."""
        self.lives += 1
        self._lost = asyncio.get_running_loop().create_future()

    def lose(self) -> None:
        """Abort the requests that it is working on: they raise ServerLost."""
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(None)

    async def ask(self, path: str, body: Any = None, **parameters: Any) -> Any:
        """Return the JSON, if any, that it answers to a POST.

        Raises ServerLost, or EngineError where it refuses (4xx).
        """
        assert self._lost is not None
        request = asyncio.ensure_future(self._request("POST", path, json=body, params=parameters))
        try:
            await asyncio.wait({request, self._lost}, return_when=asyncio.FIRST_COMPLETED)
            if not request.done():
                raise ServerLost(self.reason)
            return request.result()
        finally:
            request.cancel()

    async def get(self, path: str) -> Any:
        """Return the JSON that it answers to a GET, within the time of a health check. Raises as `ask`."""
        return await self._request("GET", path, timeout=HEALTH_TIMEOUT_SECONDS)

    async def _request(self, method: str, path: str, **options: Any) -> Any:
        import httpx

        if self._http is None:
            limits = httpx.Limits(max_keepalive_connections=64, keepalive_expiry=IDLE_SECONDS)
            self._http = httpx.AsyncClient(
                timeout=None, limits=limits, trust_env=False, verify=certificates()
            )
        place = self.name + path
        try:
            response = await self._http.request(method, self.url + path, **options)
        except httpx.TransportError as error:
            raise ServerLost(f"{place}: {type(error).__name__} {error}".strip()) from error
        if response.status_code >= 400:
            kind = ServerLost if response.status_code >= 500 else EngineError
            raise kind(f"{place}: answered {response.status_code}: {response.text[:300]}")
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return response.json() if is_json and response.content else None

    async def close(self) -> None:
        """Close the connections."""
        if self._http is not None:
            await self._http.aclose()
        self._http = self._lost = None


def servers_at(urls: Sequence[str], option: str) -> list[Server]:
    """Return the servers at these URLs, which `option` named; ConfigError where they are none."""
    if not urls or len(set(urls)) < len(urls):
        raise ConfigError(f"{option} = {','.join(urls)!r}: must be one or more different URLs")
    like = "must be like http://127.0.0.1:8000"
    return [Server(checked_url(url, f"{option} = {url!r}", like)) for url in urls]


class ServerPool:
    """Servers any of which can do what is asked."""

    def __init__(
        self,
        name: str,
        servers: Sequence[Server],
        deadline_seconds: float = 600.0,
        catch_up: Callable[[Server], Awaitable[None]] | None = None,
        max_restarts: int = 0,
        hang_seconds: float = math.inf,
    ) -> None:
        """name: begins all messages. deadline_seconds: of what is asked of all, and for a server to start.

        catch_up: what one gets before it is asked again. max_restarts: in a row; hang_seconds: one that was
        up and does not answer for so long hangs.
        """
        self.name, self.servers, self.deadline_seconds = name, list(servers), deadline_seconds
        self.max_restarts, self.hang_seconds = max_restarts, min(hang_seconds, deadline_seconds)
        self._catch_up = catch_up
        self._by_key: dict[object, Server] = {}
        self._watches: list[asyncio.Task[None]] = []
        self._threads = ThreadPoolExecutor(max(1, len(self.servers)))
        self._jobs: set[asyncio.Future[Any]] = set()

    @property
    def live(self) -> list[Server]:
        """The servers that may be asked now."""
        return [server for server in self.servers if server.live]

    def least_loaded(self) -> Server:
        """Return the least loaded server that is up, else the one that is up again first."""
        now = time.monotonic()
        return min(self.servers, key=lambda each: (max(each.down_until - now, 0), each.load, each.asked))

    async def choose(self, key: object) -> Server:
        """Return the server that `key` was given before, where it is up, else the least loaded."""
        server = self._by_key.get(key)
        if server is None or not server.live:
            self.release(key)
            await self.some()
            server = self._by_key[key] = self.least_loaded()
            server.load, server.asked = server.load + 1, server.asked + 1
        return server

    def release(self, key: object) -> None:
        """Forget which server the key was given."""
        if (server := self._by_key.pop(key, None)) is not None:
            server.load -= 1

    async def some(self) -> list[Server]:
        """Return the servers that are up; at least one, waited for while it may come back.

        Raises EngineError where none is left.
        """
        end = time.monotonic() + self.deadline_seconds
        while not (live := self.live):
            self.check(too_late=time.monotonic() > end)
            await asyncio.sleep(0.05)
        return live

    def check(self, too_late: bool = False) -> None:
        """Raise EngineError where no server is up or, if it is not too late, may come back."""
        hopeful = not self._watches or any(each.process and not each.given_up for each in self.servers)
        if not self.live and (too_late or not hopeful):
            reasons = "; ".join(server.given_up or server.reason for server in self.servers)
            when = f"there after {self.deadline_seconds:g} s" if too_late else "left"
            raise EngineError(f"{self.name}: none of {len(self.servers)} servers is {when}: {reasons}")

    async def on_all(self, act: Callable[[Server], Awaitable[Any]]) -> Mapping[Server, Any]:
        """Run `act` for each live server, within the deadline; those that fail are marked down.

        Where all fail it is tried with those that come back. Raises EngineError where none is left.
        """
        answers: dict[Server, Any] = {}

        async def attempt(server: Server) -> None:
            try:
                async with asyncio.timeout(self.deadline_seconds):
                    answers[server] = await act(server)
            except TimeoutError:
                self.mark_down(server, f"no answer within {self.deadline_seconds:g} s")
            except EngineError as error:
                self.mark_down(server, error)

        end = time.monotonic() + self.deadline_seconds
        while not answers:
            if time.monotonic() > end:
                raise EngineError(f"{self.name}: no server answered within {self.deadline_seconds:g} s")
            await asyncio.gather(*map(attempt, await self.some()))
        return answers

    def mark_down(self, server: Server, reason: object) -> None:
        """Ask it no more until it is well again, or for a while that doubles; give up what it is asked."""
        server.reason = str(reason)
        if not server.live:
            return  # several were asked of it at once
        now = time.monotonic()
        if not server.failures:
            _log.warning("%s: %s is passed over: %s", self.name, server.name, reason)
        if now - server.since > STEADY_SECONDS:
            server.restarts = 0
        server.since = now
        server.down_until = math.inf if self._watches else now + pause_seconds(server.failures)
        server.failures += 1
        server.lose()

    def mark_up(self, server: Server) -> None:
        """Let it be asked."""
        if server.failures or server.lives > 1:
            _log.warning("%s: %s answers again", self.name, server.name)
        if not server.live:
            server.since = time.monotonic()
        server.failures, server.given_up, server.down_until = 0, "", 0.0

    async def start(self) -> None:
        """Watch from now on; return when all are up or given up, or at the deadline where some are up.

        A server that has no URL yet is started. Raises EngineError where none is up.
        """
        if not self._watches:
            for server in self.servers:
                server.down_until = math.inf
            self._watches = [asyncio.ensure_future(self._keep_watch(server)) for server in self.servers]
        end = time.monotonic() + self.deadline_seconds
        while not all(server.live or server.given_up for server in self.servers) and time.monotonic() < end:
            await asyncio.sleep(0.05)
        self.check(too_late=time.monotonic() >= end)

    async def close(self, grace_seconds: float = STOP_SECONDS) -> None:
        """Stop watching, end what was started, side by side, and close all connections."""
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        self._watches = []
        if self._jobs:  # none may start what we are about to end
            await asyncio.wait(self._jobs, timeout=HEALTH_TIMEOUT_SECONDS)
        started = [server.process for server in self.servers if server.process]
        await asyncio.gather(*(self._in_thread(process.stop, grace_seconds) for process in started))
        for server in self.servers:
            await server.close()

    async def _keep_watch(self, server: Server) -> None:
        if server.process is not None and not server.url:
            server.url = await self._in_thread(server.process.restart)
        while True:
            await self._look_after(server)
            await asyncio.sleep(HEALTH_EVERY_SECONDS)

    async def _look_after(self, server: Server) -> None:
        try:
            await server.get(server.health)
            if not server.live:
                server.open()
                if self._catch_up is not None:
                    async with asyncio.timeout(self.deadline_seconds):
                        await self._catch_up(server)
                self.mark_up(server)
        except Exception as error:  # whatever it is, the watch goes on
            self.mark_down(server, reason_of(error))
            if server.process is not None and not server.given_up:
                await self._restart(server, server.process)

    async def _restart(self, server: Server, process: ServerProcess) -> None:
        """Start it again if it has ended or hangs; give it up where that was done too often."""
        why = await self._in_thread(process.ended)
        silent, was_up = time.monotonic() - server.since, bool(server.failures)
        if why is None and silent > (self.hang_seconds if was_up else self.deadline_seconds):
            why = f"no answer at {server.url}{server.health} for {silent:.0f} s"
        if why is None:
            return
        again = server.restarts < self.max_restarts
        log_restart(process, why, server.restarts, again)
        if not again:
            server.given_up = f"{process.name}: {why} (see {process.log})"
            return await self._in_thread(process.stop, 0)
        await asyncio.sleep(pause_seconds(server.restarts) if server.restarts else 0)
        server.restarts, server.failures = server.restarts + 1, 0
        server.url = await self._in_thread(process.restart)
        server.since = time.monotonic()

    async def _in_thread(self, act: Callable[..., Any], *arguments: Any) -> Any:
        """Run it in a thread that `close` waits for."""
        job = asyncio.get_running_loop().run_in_executor(self._threads, act, *arguments)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        return await asyncio.shield(job)


def log_restart(process: ServerProcess, why: str, restarts: int, again: bool) -> None:
    """Say why a server is started again, or no more."""
    then = "started again" if again else f"given up after {restarts} restarts"
    _log.warning("%s: %s; %s (see %s)", process.name, why, then, process.log)


def pause_seconds(failures: int) -> float:
    """Return how long what has failed is left alone: twice as long after every failure in a row."""
    return min(FIRST_PAUSE_SECONDS * 2**failures, LONGEST_PAUSE_SECONDS)
