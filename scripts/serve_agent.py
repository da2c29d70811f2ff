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
from scripts.agent_options import AgentLimits, AgentOptions
from scripts.listening import announce, hosts_of, read_token

if TYPE_CHECKING:
    from scripts.wiring import OpenedAgent


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
    from scripts.wiring import open_asked

    listen(config.host, config.port).close()  # whether it is free, before anything is opened
    read_token(config.token_file, "token_file")
    opened = open_asked(config, config.concurrency)
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
