"""`sleuth serve-agent`: a policy that searches, for clients of OpenAI's chat completions and in a browser."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import SleuthError, require_range
from retriever_server.server.config import Listening
from scripts.agent_options import AgentOptions
from scripts.listening import announce, hosts_of, read_token

if TYPE_CHECKING:
    from scripts.wiring import OpenedAgent


@dataclass(frozen=True, kw_only=True)
class AgentLimits:
    """The most that one request, and all of them together, may ask for."""

    concurrency: int = 16
    """Questions worked on at once; they share the engine."""
    max_waiting: int = 64
    """Questions that may wait for a place; beyond it 429."""
    max_tokens: int = 4096
    """The most tokens that the policy writes for one question; a client may ask for fewer."""
    max_question_chars: int = 8192
    """The longest question."""
    max_deadline_seconds: int = 300
    """The longest that a question may take; then it gets 504."""

    def __post_init__(self) -> None:
        at_least_one = ("concurrency", "max_tokens", "max_question_chars", "max_deadline_seconds")
        require_range(self, "", ">= 1", *at_least_one)
        require_range(self, "", ">= 0", "max_waiting")


@dataclass(frozen=True, kw_only=True)
class ServeAgentConfig(AgentOptions, AgentLimits, Listening):
    """Serve a policy with its retriever until SIGTERM or Ctrl-C; questions in flight are finished first."""

    port: int = 8080
    """0 takes a free one."""
    name: str | None = None
    """Name of the model to clients; none: that of the policy or of its folder."""
    temperature: float = 0.0
    """Temperature where the client gives none; 0 is greedy."""
    max_body_bytes: int = 1 << 20
    """The largest request."""
    deadline_seconds: float = 30.0
    """Seconds for which a search is retried."""

    def __post_init__(self) -> None:
        AgentLimits.__post_init__(self)
        Listening.__post_init__(self)
        require_range(self, "", ">= 1", "max_body_bytes")


def main(config: ServeAgentConfig) -> None:
    """Serve a policy with its retriever until SIGTERM or Ctrl-C; questions in flight are finished first."""
    from retriever_server.server.connections import listen, run_until_stopped

    listen(config.host, config.port).close()  # whether it is free, before anything is opened
    read_token(config.token_file, "token_file")
    opened = config.open(config.concurrency)
    failures: list[SleuthError] = []
    app = build_app(config, opened, failures)
    with listen(config.host, config.port) as listener:
        announce(config, listener.getsockname(), app.state.service.name)
        try:
            run_until_stopped(app, listener, config)
        finally:
            if failures:
                raise failures[0]


def build_app(config: ServeAgentConfig, opened: OpenedAgent, failures: list[SleuthError]) -> Any:
    """Return the application; it opens the agent in its own loop, and stops if that fails."""
    from retriever_server.server.middleware import Access, RequestLog, RequestMiddleware
    from scripts.agent_server import AgentService, create_app

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(opened)
                await opened.check()
            except SleuthError as error:
                failures.append(error)
                os.kill(os.getpid(), signal.SIGTERM)
            yield

    policy = Path(config.policy)
    service = AgentService(
        opened.agent, config.name or (policy.resolve().name if policy.is_dir() else config.policy), config
    )
    app = create_app(service, lifespan=lifespan)
    app.add_middleware(
        RequestMiddleware,
        metrics=service.metrics,
        access=Access(read_token(config.token_file, "token_file"), None, hosts_of(config)),
        max_body_bytes=config.max_body_bytes,
        request_log=RequestLog(Path(config.request_log)) if config.request_log else None,
    )
    return app
