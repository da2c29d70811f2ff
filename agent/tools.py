"""The tools that a policy may call, by name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from typing import Protocol as Interface

from data.text import replace_halves

if TYPE_CHECKING:
    from data.records import Hit


@dataclass(frozen=True)
class Tool:
    """A tool with one argument, which stands inside a tag, or by its name in a call as JSON."""

    name: str
    does: str
    """For the prompt."""
    argument: str
    example: str
    """Stands for the argument in the prompt."""
    types: tuple[str, ...] = ("string",)
    """JSON types of the argument."""
    parameters: Mapping[str, Any] | None = field(default=None, hash=False)
    """The JSON schema, for a tool of an MCP server. With argument "" a call has the object of them all."""

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of its arguments."""
        if self.parameters is not None:
            return dict(self.parameters)
        properties = {self.argument: {"type": list(self.types)}}
        return {"type": "object", "properties": properties, "required": [self.argument]}

    def read(self, given: Any) -> str | None:
        """Return the argument of a call with these `arguments`; None where they are none."""
        if not self.argument:
            return replace_halves(json.dumps(given, ensure_ascii=False)) if isinstance(given, dict) else None
        argument = given[self.argument]
        if type(argument) is int and "integer" in self.types:
            return str(argument)
        return replace_halves(argument).strip() if isinstance(argument, str) else None

    def arguments(self, argument: str) -> dict[str, Any] | None:
        """Invert it; None where the argument is no object."""
        if self.argument:
            whole = "integer" in self.types and re.fullmatch(r"-?\d{1,15}", argument, re.ASCII)
            return {self.argument: int(argument) if whole and self.parameters else argument}
        with suppress(ValueError, RecursionError):
            if isinstance(given := json.loads(argument), dict):
                return given
        return None


SEARCH = Tool("search", "finds passages", "query", "query")
OPEN_PAGE = Tool(
    "open_page",
    "reads the whole document that a passage is from",
    "passage",
    "number of the passage",
    ("string", "integer"),
)
TOOLS = {tool.name: tool for tool in (SEARCH, OPEN_PAGE)}


class ToolServer(Interface):
    """A server of further tools (agent/mcp_tools.py)."""

    tools: tuple[Tool, ...]
    names: tuple[str, ...]
    max_calls: int
    """Calls of a trajectory."""

    async def call(self, tool: Tool, argument: str) -> list[Hit] | None:
        """Return what a tool returns; None where the arguments are none of it. Raises ToolUnavailable."""
        ...


@dataclass(frozen=True)
class Call:
    """The policy calls a tool with its one argument, such as a query."""

    tool: str
    argument: str


Search = partial(Call, SEARCH.name)
"""A call of `search` with this query."""


def read_call(text: str, tools: Mapping[str, Tool] = TOOLS) -> Call | None:
    """The call in {"name": "search", "arguments": {"query": "..."}}; None if it is anything else."""
    try:
        call = json.loads(text)
        tool = tools[call["name"]]
        argument = tool.read(call["arguments"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return None if argument is None else Call(tool.name, argument)


def write_call(call: Call, tools: Mapping[str, Tool] = TOOLS) -> str:
    """Its inverse."""
    arguments = tools[call.tool].arguments(call.argument)
    return json.dumps({"name": call.tool, "arguments": arguments}, ensure_ascii=False)
