"""The retriever to clients of the Model Context Protocol: tools `search` and `fetch`."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from data.errors import ConfigError, DataError
from data.records import Passage
from retriever_server.server.batching import Overloaded
from retriever_server.server.errors import QueryFailed
from retriever_server.server.service import Caller, SearchService


def make_mcp(service: SearchService) -> Any:
    """Return an MCP server with the tools `search` and `fetch`."""
    from mcp.server import MCPServer
    from mcp.server.mcpserver.exceptions import ToolError

    server = MCPServer("sleuth", instructions="Search a collection of passages, then fetch one by its id.")

    @server.tool()
    async def search(query: str, top_k: int | None = None) -> dict[str, Any]:
        """Passages that answer a query, best first: id, title, url and text of each."""
        try:
            [hits], _ = await Caller(service).rank([query], top_k)
        except (DataError, ConfigError, QueryFailed, Overloaded, TimeoutError) as error:
            raise ToolError(str(error)) from error
        return {"results": [{**_render(hit.passage), "score": hit.score} for hit in hits]}

    @server.tool()
    async def fetch(id: str) -> dict[str, Any]:
        """The page of the collection with this id or url."""
        [page] = await service.fetch([id])
        if page is None:
            raise ToolError(f"no page {id!r} in this collection")
        return {**_render(page), "metadata": dict(page.metadata)}

    return server


def add_mcp(app: FastAPI, server: Any, guarded: bool) -> None:
    """Mount an MCP server at `/mcp` (streamable HTTP, stateless: any worker answers).

    Not `guarded` by a token, it answers only who calls it by a loopback name, so that no web page can.
    """
    from mcp.server.transport_security import TransportSecuritySettings

    security = TransportSecuritySettings(enable_dns_rebinding_protection=False) if guarded else None
    mounted = server.streamable_http_app(json_response=True, stateless_http=True, transport_security=security)
    app.router.routes.extend(mounted.routes)


def _render(passage: Passage) -> dict[str, Any]:
    url = str(passage.metadata.get("url") or "")
    return {"id": passage.id, "title": passage.title, "text": passage.text, "url": url}
