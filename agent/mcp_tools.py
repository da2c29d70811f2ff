"""Tools of MCP servers, for the policy to call: `tools: [search, {mcp: URL or command}]` (docs/agent.md).

The model is wrong (arguments that are none, a call too many): an invalid action. The tool says that it
failed: an observation. The world is wrong (nobody answers, or not in time): a ToolUnavailable.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from agent.tools import TOOLS, Tool
from data.errors import ConfigError, ToolUnavailable, first_line, reason_of, require, require_range
from data.records import Hit, Passage

_log = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z][\w-]*")
_INVALID_PARAMS = -32602
_WAIT_SECONDS = 0.2
_MAX_DESCRIPTION_CHARS = 1000
"""Longest description of a tool in the prompt."""


@dataclass(frozen=True)
class McpConfig:
    """A server of the Model Context Protocol, and the limits of its tools."""

    mcp: str
    """URL (streamable HTTP), or a command that speaks MCP on its stdin and stdout."""
    tools: tuple[str, ...] | None = None
    """Names of its tools that are offered; None: all."""
    timeout_seconds: float = 30.0
    """The longest that one call may take, a new connection included."""
    max_calls: int = 8
    """Calls of a trajectory; one more is an invalid action."""
    max_bytes: int = 100_000
    """A result is cut at so many; what is read of it is `max_observation_tokens` at most."""

    def __post_init__(self) -> None:
        require(bool(self.mcp.strip()), "tools.mcp", self.mcp, "a URL or a command")
        require_range(self, "tools.", "> 0", "timeout_seconds")
        require_range(self, "tools.", ">= 1", "max_calls", "max_bytes")


def read_config(asked: Mapping[str, Any]) -> McpConfig:
    """Return the server that an entry of `tools` describes; raises ConfigError and ValueError."""
    from data.objects.class_path import Signature

    takes = Signature(McpConfig, "a server of tools", "protocol.tools")
    takes.check_keys(asked)
    takes.check_required(asked)
    return McpConfig(**takes.typed(asked))


class McpServer:
    """A server and its tools; it serves any number of event loops, each by a connection of its own."""

    def __init__(self, config: McpConfig) -> None:
        """Ask it for its tools. Raises ConfigError, and ToolUnavailable where it does not answer."""
        self.config, self.max_calls = config, config.max_calls
        self._connections: WeakKeyDictionary[asyncio.AbstractEventLoop, _Connection] = WeakKeyDictionary()
        offered = asyncio.run(self._list())
        names = offered.keys() if config.tools is None else config.tools
        for name in names:
            if name not in offered or name in TOOLS or not _NAME.fullmatch(name):
                allowed = ", ".join(sorted(set(filter(_NAME.fullmatch, offered)) - TOOLS.keys()))
                raise ConfigError(
                    f"tools.mcp {config.mcp}: tools: {name!r}: must be one of {allowed or 'none'}"
                )
        self.tools = tuple(_as_tool(offered[name]) for name in names)
        self.names = tuple(tool.name for tool in self.tools)

    async def call(self, tool: Tool, argument: str) -> list[Hit] | None:
        """Return what a tool returns, as one hit; None where the arguments are none of it.

        A connection that breaks is made again until `timeout_seconds` are over; raises ToolUnavailable.
        """
        from mcp import MCPError

        failures: list[str] = []
        calling = asyncio.create_task(self._retried(tool.name, tool.arguments(argument) or {}, failures))
        try:  # not waited for at the end: taking a call back may itself hang
            done, _ = await asyncio.wait([calling], timeout=self.config.timeout_seconds)
        finally:
            calling.cancel()
        waited = f"no answer in {self.config.timeout_seconds:g} s"
        why = "".join(f" ({each})" for each in failures[-1:])
        error = calling.exception() if done else TimeoutError(waited + why)
        if isinstance(error, MCPError) and error.error.code == _INVALID_PARAMS:
            return None
        if error is not None:
            raise ToolUnavailable(f"{self.config.mcp}: {tool.name}: {first_line(error)}") from error
        said = read_result(calling.result()).encode(errors="replace")
        text = said[: self.config.max_bytes].decode(errors="ignore")
        return [Hit(Passage(f"{tool.name} {argument}", text, tool.name), 0.0, "")]

    async def _retried(self, name: str, arguments: dict[str, Any], failures: list[str]) -> Any:
        """Return the first result; failures gets the reason of each attempt that brought none."""
        loop = asyncio.get_running_loop()
        while True:
            connection = self._connections.get(loop)
            if connection is None or connection.task.done():
                connection = self._connections[loop] = _Connection(_make_client(self.config))
            try:
                client = await connection.client()
                return await client.call_tool(name, arguments)
            except Exception as error:
                if _is_answer(error):
                    raise
                failures.append(_reason(error))
                _log.warning("%s: %s: %s; asked again", self.config.mcp, name, failures[-1])
                connection.task.cancel()
                if self._connections.get(loop) is connection:  # another call may have opened a new one
                    del self._connections[loop]
                await asyncio.sleep(_WAIT_SECONDS)

    async def _list(self) -> dict[str, Any]:
        """Return its tools by name, of all its pages."""
        client = _make_client(self.config)  # before the clock runs: the import takes seconds
        connection = _Connection(client)
        try:
            async with asyncio.timeout(self.config.timeout_seconds):
                listing = (await connection.client()).list_tools
                offered, page = {}, await listing()
                while new := {tool.name: tool for tool in page.tools if tool.name not in offered}:
                    offered |= new
                    page = await listing(cursor=page.next_cursor) if page.next_cursor else page
                return offered
        except TimeoutError as error:
            waited = f"no answer in {self.config.timeout_seconds:g} s"
            raise ToolUnavailable(f"tools.mcp {self.config.mcp}: {waited}") from error
        except Exception as error:
            raise ToolUnavailable(f"tools.mcp {self.config.mcp}: {_reason(error)}") from error
        finally:
            connection.task.cancel()
            await asyncio.wait([connection.task])


class _Connection:
    """A client that is opened and closed by one task, as its cancel scopes want it."""

    def __init__(self, unopened: Any) -> None:
        self._ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(self._hold(unopened))

    async def client(self) -> Any:
        """Return the client, once it is connected; raises what kept it from that."""
        return await asyncio.shield(self._ready)

    async def _hold(self, unopened: Any) -> None:
        try:
            async with unopened as client:
                self._ready.set_result(client)
                await asyncio.Event().wait()
        except Exception as error:
            self._fail(error)
        finally:
            self._fail(ConnectionError("the connection was closed"))

    def _fail(self, error: Exception) -> None:
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # nobody may ask for it


def _reason(error: BaseException) -> str:
    """Return what went wrong, of a group of errors the first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return reason_of(error)


def _make_client(config: McpConfig) -> Any:
    try:
        from mcp import Client, StdioServerParameters, stdio_client
    except ImportError as error:
        raise ConfigError("tools.mcp needs the package mcp: pip install 'sleuth-rl[mcp]'") from error
    if "://" in config.mcp:
        return Client(config.mcp, cache=None)
    logging.getLogger(stdio_client.__module__).addFilter(_without_traceback)
    command, *arguments = shlex.split(config.mcp)
    process = stdio_client(StdioServerParameters(command=command, args=arguments))  # mcp 2.0 takes no less
    return Client(process, cache=None)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Keep to one line what is logged of a server that prints other things between its messages."""
    record.exc_info = None
    return True


def _is_answer(error: Exception) -> bool:
    """Return whether the server itself said so, rightly or in no form of a result; a connection that closed
    is no answer."""
    from mcp import MCPError
    from pydantic import ValidationError

    if isinstance(error, MCPError):
        return error.error.code not in (-32000, -32001)
    against_its_schema = isinstance(error, RuntimeError) and "structured content" in str(error)
    return against_its_schema or isinstance(error, ValidationError)


def read_result(result: Any) -> str:
    """Return the text of a tool's result; where it has none, its structured content as JSON, and a word for
    what no text shows, such as a picture."""
    parts = [_read_part(part) for part in result.content]
    if not any(text for text, _ in parts) and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(text or f"[{other}]" for text, other in parts if text or other) or "[nothing]"


def _read_part(part: Any) -> tuple[str, str]:
    """Return the text of a part of a result, and what it is where it has none."""
    if part.type == "resource_link":
        return " ".join(filter(None, [part.title or part.name, str(part.uri), part.description])), ""
    inside = part.resource if part.type == "resource" else part
    kind = getattr(inside, "mime_type", None) or part.type
    return getattr(inside, "text", ""), "" if hasattr(inside, "text") else f"{kind}: not shown"


def _as_tool(offered: Any) -> Tool:
    """Return a tool of theirs as one of ours: with its one argument by name, else all of them as JSON."""
    schema = dict(offered.input_schema)
    properties, needed = schema.get("properties") or {}, schema.get("required") or []
    does = " ".join((offered.description or offered.name).split()).rstrip(".")
    if len(does) > _MAX_DESCRIPTION_CHARS:
        _log.warning(
            "%s: %d characters of description, cut at %d", offered.name, len(does), _MAX_DESCRIPTION_CHARS
        )
        does = f"{does[:_MAX_DESCRIPTION_CHARS]} [cut]"
    if len(properties) == 1 or len(needed) == 1:
        [name] = needed or properties
        kind = properties.get(name, {}).get("type")
        if kind in ("string", "integer"):
            types = ("string", "integer") if kind == "integer" else ("string",)
            return Tool(offered.name, does, name, name, types, parameters=schema)
    example = json.dumps(_example(schema, schema.get("$defs") or {}))
    return Tool(offered.name, does, "", example, parameters=schema)


def _example(schema: Any, named: Mapping[str, Any], depth: int = 3) -> Any:
    """Return a value in the form of a JSON schema, down to `depth`, with "..." for what has no parts."""
    schema = schema if isinstance(schema, Mapping) else {}
    schema = named.get(str(schema.get("$ref", "")).removeprefix("#/$defs/"), schema)
    if depth and schema.get("type") == "array":
        return [_example(schema.get("items"), named, depth - 1)]
    if depth and (schema.get("properties") or depth == 3):
        properties = schema.get("properties") or {}
        return {name: _example(each, named, depth - 1) for name, each in properties.items()}
    return "..."


@cache
def open_server(config: McpConfig) -> McpServer:
    """Return the server of this configuration, asked for its tools once a process."""
    return McpServer(config)
