"""The tools that a policy may call, by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from data.text import replace_halves


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

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of its arguments."""
        properties = {self.argument: {"type": list(self.types)}}
        return {"type": "object", "properties": properties, "required": [self.argument]}


SEARCH = Tool("search", "finds passages", "query", "query")
OPEN_PAGE = Tool(
    "open_page",
    "reads the whole document that a passage is from",
    "passage",
    "number of the passage",
    ("string", "integer"),
)
TOOLS = {tool.name: tool for tool in (SEARCH, OPEN_PAGE)}


@dataclass(frozen=True)
class Call:
    """The policy calls a tool with its one argument, such as a query."""

    tool: str
    argument: str


Search = partial(Call, SEARCH.name)
"""A call of `search` with this query."""


def read_call(text: str) -> Call | None:
    """The call in {"name": "search", "arguments": {"query": "..."}}; None if it is anything else."""
    try:
        call = json.loads(text)
        tool = TOOLS[call["name"]]
        argument = call["arguments"][tool.argument]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if type(argument) is int and "integer" in tool.types:
        argument = str(argument)
    return Call(tool.name, replace_halves(argument).strip()) if isinstance(argument, str) else None


def write_call(call: Call) -> str:
    """Its inverse."""
    arguments: Mapping[str, str] = {TOOLS[call.tool].argument: call.argument}
    return json.dumps({"name": call.tool, "arguments": arguments}, ensure_ascii=False)
