"""vLLM servers over HTTP: which one a trajectory asks, and which of them still live.

A trajectory stays with the server that has its prefix in its cache; a new one goes where the fewest are.
A server that breaks a connection, answers 5xx or does not answer its health check is taken out; what it
was asked is asked elsewhere. It comes back when it is healthy again, with the weights of the others; where
somebody revives it (who started it, agent/engines/vllm_process.py), it is waited for if none is left.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import httpx

from data.errors import ConfigError, EngineError

logger = logging.getLogger(__name__)

HEALTH_EVERY_SECONDS = 5.0
HEALTH_TIMEOUT_SECONDS = 30.0
"""A server that computes on every core of a CPU may be slow to say that it is well."""


IDLE_SECONDS = 2.0
"""A connection idle for longer is not used again: vLLM closes it after 5 s, maybe under the next request."""


class ServerLost(EngineError):
    """A server broke off, answered 5xx or was taken out: whatever it was asked can be asked elsewhere."""


class Server:
    """One vLLM server."""

    def __init__(self, url: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"engine.urls = {url!r}: must be like http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        self.trajectories: set[str] = set()
        self.lost: asyncio.Future[str] | None = None
        """Done, with the reason, once it is taken out."""
        self.ready = False
        self.lives = 0
        """Times it was opened; it has forgotten what was agreed before."""
        self.out_since: float | None = None
        """When it was taken out, by the clock of the event loop."""
        self.given_up = False
        """True once nobody starts it again."""
        self._http: httpx.AsyncClient | None = None

    @property
    def live(self) -> bool:
        """True while it may be asked."""
        return self.ready and self.lost is not None and not self.lost.done()

    def open(self) -> None:
        """Let it be asked in this event loop; by trajectories only once it is `ready`."""
        self.ready = False
        self.lives += 1
        self.lost = asyncio.get_running_loop().create_future()
        if self._http is None:
            limits = httpx.Limits(
                max_connections=None, max_keepalive_connections=64, keepalive_expiry=IDLE_SECONDS
            )
            self._http = httpx.AsyncClient(base_url=self.url, timeout=None, limits=limits)

    def take_out(self, reason: str) -> None:
        """Ask it no more, and give up what it is being asked."""
        if self.lost is not None and not self.lost.done():
            logger.warning("engine vllm: %s is taken out: %s", self.url, reason)
            self.lost.set_result(reason)
            self.trajectories.clear()
            self.out_since = self.out_since or asyncio.get_running_loop().time()

    def welcome(self) -> None:
        """Let trajectories ask it."""
        self.ready, self.out_since, self.given_up = True, None, False

    async def ask(self, path: str, body: Any = None, **parameters: Any) -> Any:
        """The JSON, if any, that it answers to a POST.

        Raises ServerLost, or EngineError where it refuses (4xx).
        """
        assert self._http is not None and self.lost is not None
        request = asyncio.ensure_future(self._http.post(path, json=body, params=parameters))
        try:
            await asyncio.wait({request, self.lost}, return_when=asyncio.FIRST_COMPLETED)
            if not request.done():
                raise ServerLost(f"{self.url}: {self.lost.result()}")
            return _content(self.url + path, request.result())
        except httpx.TransportError as error:
            raise ServerLost(f"{self.url}: {type(error).__name__} {error}".strip()) from error
        finally:
            request.cancel()

    async def get(self, path: str) -> Any:
        """The JSON that it answers to a GET, within the time of a health check. Raises as `ask`."""
        assert self._http is not None
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_SECONDS):
                response = await self._http.get(path)
        except (httpx.TransportError, TimeoutError) as error:
            raise ServerLost(f"{self.url}{path}: {type(error).__name__} {error}".strip()) from error
        return _content(self.url + path, response)

    async def close(self) -> None:
        """Close the connections."""
        if self._http is not None:
            await self._http.aclose()
        self._http = self.lost = None


def _content(place: str, response: httpx.Response) -> Any:
    if response.status_code >= 500:
        raise ServerLost(f"{place}: answered {response.status_code}: {response.text[:300]}")
    if response.status_code >= 400:
        raise EngineError(f"engine vllm: {place} refused ({response.status_code}): {response.text[:300]}")
    is_json = response.headers.get("content-type", "").startswith("application/json")
    return response.json() if is_json and response.content else None


class Fleet:
    """The servers of one engine."""

    def __init__(
        self,
        urls: Sequence[str],
        deadline_seconds: float = 600.0,
        catch_up: Callable[[Server], Awaitable[None]] | None = None,
        revive: Callable[[str, float], bool] | None = None,
    ) -> None:
        """catch_up: what a server gets before it is asked again.

        revive: told a URL and for how many seconds it has been out, may start that server again, and says
        whether it may yet come back; it is called again and again, in a thread.
        """
        if not urls or len(set(urls)) < len(urls):
            raise ConfigError(f"engine.urls = {','.join(urls)!r}: must be one or more different URLs")
        self.servers = [Server(url) for url in urls]
        self.deadline_seconds = deadline_seconds
        self._catch_up, self._revive = catch_up, revive
        self._by_trajectory: dict[str, Server] = {}
        self._watches: list[asyncio.Task[None]] = []

    @property
    def live(self) -> list[Server]:
        """The servers that may be asked now."""
        return [server for server in self.servers if server.live]

    async def some(self) -> list[Server]:
        """The servers that may be asked; at least one, waited for while it may come back.

        Raises EngineError where none is left.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + self.deadline_seconds
        while not (live := self.live):
            hopeless = self._revive is None or all(server.given_up for server in self.servers)
            if hopeless or loop.time() > end:
                raise self._none_left()
            await asyncio.sleep(0.05)
        return live

    def _none_left(self) -> EngineError:
        reasons = "; ".join(s.lost.result() for s in self.servers if s.lost and s.lost.done())
        return EngineError(f"engine vllm: none of {len(self.servers)} servers is left: {reasons}")

    async def start(self, check: Callable[[], None] = lambda: None) -> None:
        """Wait for all servers until the deadline; `check` raises if one that is starting has died.

        Those that are not there by then are taken out. Raises EngineError where none is there.
        """
        if not self._watches:
            await asyncio.gather(*(self._await(server, check) for server in self.servers))
            if not self.live:
                raise self._none_left()
            self._watches = [asyncio.ensure_future(self._keep_watch(server)) for server in self.servers]

    async def _await(self, server: Server, check: Callable[[], None]) -> None:
        server.open()
        reason = "it did not answer"
        try:
            async with asyncio.timeout(self.deadline_seconds):
                while True:
                    try:
                        await server.get("/health")
                        server.welcome()
                        return
                    except EngineError as error:
                        reason = str(error)
                    check()
                    await asyncio.sleep(0.2)
        except TimeoutError:
            server.take_out(f"not there after {self.deadline_seconds:g} s: {reason}")

    async def choose(self, trajectory_id: str) -> Server:
        """The server that holds the trajectory's cache, else that with the fewest trajectories."""
        server = self._by_trajectory.get(trajectory_id)
        if server is None or not server.live:
            server = min(await self.some(), key=lambda each: len(each.trajectories))
            self._by_trajectory[trajectory_id] = server
        server.trajectories.add(trajectory_id)
        return server

    def release(self, trajectory_id: str) -> None:
        """Forget where the trajectory was."""
        server = self._by_trajectory.pop(trajectory_id, None)
        if server is not None:
            server.trajectories.discard(trajectory_id)

    async def on_all(self, act: Callable[[Server], Awaitable[Any]]) -> Mapping[Server, Any]:
        """Run `act` for each live server, within the deadline; those that fail are taken out.

        Where all fail it is tried with those that come back. Raises EngineError where none is left.
        """

        async def attempt(server: Server) -> Any:
            try:
                async with asyncio.timeout(self.deadline_seconds):
                    return await act(server)
            except TimeoutError:
                server.take_out(f"no answer within {self.deadline_seconds:g} s")
            except EngineError as error:
                server.take_out(str(error))
            return None

        loop = asyncio.get_running_loop()
        end = loop.time() + self.deadline_seconds
        while True:
            asked = await self.some()
            answers = dict(zip(asked, await asyncio.gather(*map(attempt, asked)), strict=True))
            if done := {server: answers[server] for server in self.live if server in answers}:
                return done
            if loop.time() > end:
                raise EngineError(f"engine vllm: no server did it within {self.deadline_seconds:g} s")

    async def close(self) -> None:
        """Stop watching and close all connections."""
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        self._watches = []
        for server in self.servers:
            await server.close()

    async def _keep_watch(self, server: Server) -> None:
        while True:
            await asyncio.sleep(HEALTH_EVERY_SECONDS)
            await self._look_after(server)

    async def _look_after(self, server: Server) -> None:
        try:
            await server.get("/health")
            if not server.live:
                server.open()
                if self._catch_up is not None:
                    async with asyncio.timeout(self.deadline_seconds):
                        await self._catch_up(server)
                server.welcome()
                logger.warning("engine vllm: %s is back", server.url)
        except (EngineError, TimeoutError) as error:
            server.take_out(str(error) or "no answer in time")
            if self._revive is not None and not server.given_up and server.out_since is not None:
                out_seconds = asyncio.get_running_loop().time() - server.out_since
                server.given_up = not await asyncio.to_thread(self._revive, server.url, out_seconds)
