"""`sleuth search`: the passages that a retriever finds for a query, in the terminal."""

from __future__ import annotations

import asyncio

from data.errors import ConfigError
from data.records import Hit, Input, Item
from data.text import replace_halves
from scripts.console import stdout_console, visible


def main(
    retriever: str, query: str = "", image: str = "", top_k: int = 3, deadline_seconds: float = 30.0
) -> None:
    """Print the best passages for a query: a text, an image, or an image and what is said with it.

    Args:
        query: What to search.
        image: A picture to search with: a file, or a page of one such as report.pdf#page=3.
        retriever: URL of a server, folder of an index, a .yaml file, none or random:INDEX.
        top_k: How many passages.
        deadline_seconds: How long to wait for a server that does not answer.
    """
    if not query and not image:
        raise ConfigError("query: must be given, or an --image")
    query = replace_halves(query)
    asked = Item(image, query) if image else query
    _show(query or image, asyncio.run(_search(asked, retriever, top_k, deadline_seconds)))


async def _search(query: Input, retriever: str, top_k: int, deadline_seconds: float) -> list[Hit]:
    from retriever_server.client.search_client import connect

    async with connect(retriever, deadline_seconds) as client:
        await client.probe()
        return await client.search(query, top_k)


def _show(query: str, hits: list[Hit]) -> None:
    from rich.text import Text

    console = stdout_console()
    if not hits:
        console.print(Text(f"nothing found for {query!r}"))
    for rank, hit in enumerate(hits, start=1):
        # As Text: square brackets in a passage are no markup.
        head = Text(f"{rank}  ", style="dim")
        head.append(visible(hit.passage.title or hit.passage.id), style="bold")
        head.append(f"  {hit.score:.3f}  {visible(hit.passage.id)}", style="dim")
        console.print(head)
        if hit.passage.image:
            console.print(Text(visible(hit.passage.image), style="dim"))
        console.print(Text(f"{visible(hit.passage.text)}\n"))
