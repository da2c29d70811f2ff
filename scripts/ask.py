"""`sleuth ask`: watch a policy think, search, read and answer, in the terminal."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from data.errors import ConfigError, RetrieverError
from data.records import Hit, Passage, Question
from data.text import replace_halves
from scripts.agent_options import AgentOptions
from scripts.console import stdout_console, visible

if TYPE_CHECKING:
    from agent.protocol import Protocol
    from agent.rollout import Agent
    from agent.trajectory import Segment, Trajectory

NO_ANSWER = 3
"""Exit status."""
PREVIEW_CHARS = 160
STYLES = {
    "thought": "italic",
    "search": "bold cyan",
    "open_page": "bold cyan",
    "answer": "bold green",
    "text": "dim",
}


@dataclass(frozen=True, kw_only=True)
class AskConfig(AgentOptions):
    """A question to a policy."""

    question: str
    """The question to answer."""
    seed: int = 0
    """Seed of sampling."""
    deadline_seconds: float = 30.0
    """Seconds for which a search is retried."""


def main(config: AskConfig) -> int:
    """Ask one question; thoughts, searches, passages and the answer appear as they come.

    Exits with 3 where there is no answer.
    """
    if not config.question.strip():
        raise ConfigError(f"question = {config.question!r}: must hold a word")
    from scripts.wiring import open_asked

    opened = open_asked(config, max_rows=1)
    asked = Question("ask", replace_halves(config.question), ())

    async def run() -> Trajectory:
        async with opened:
            await opened.check()
            return await _watch(opened.agent, asked, config.seed)

    trajectory = asyncio.run(run())
    if trajectory.searches and trajectory.searches[-1].error:
        raise RetrieverError(trajectory.searches[-1].error)
    answer = trajectory.answer
    print(f"no answer ({trajectory.stop_reason})" if answer is None else answer)
    return NO_ANSWER if answer is None else 0


async def _watch(agent: Agent, question: Question, seed: int) -> Trajectory:
    view = _View(stdout_console(highlight=False), agent.spoken)
    watched = replace(agent, searcher=_WatchedSearcher(agent.searcher, view))
    with view.console.status("reading the question"):  # nothing where it is no terminal
        trajectories = await watched.rollout([question], seed, on_segment=view.show_segment)
    return trajectories[0]


class _WatchedSearcher:
    """Shows the hits of a searcher."""

    def __init__(self, searcher: Any, view: _View) -> None:
        self._searcher, self._view = searcher, view

    async def search(self, query: str, k: int) -> list[Hit]:
        hits = await self._searcher.search(query, k)
        self._view.show_hits(hits)
        return hits

    async def picture(self, passage: Passage) -> bytes:
        """As the searcher has it."""
        return await self._searcher.picture(passage)

    async def document(self, passage_id: str) -> Passage | None:
        """As the searcher has it."""
        page = await self._searcher.document(passage_id)
        if page is not None:
            self._view.show_hits([Hit(page, 0.0, "")])
        return page


class _View:
    """One trajectory in the terminal; plain text where it is none."""

    def __init__(self, console, protocol: Protocol) -> None:
        self.console, self.protocol = console, protocol

    def show_segment(self, segment: Segment) -> None:
        """Print a turn part by part; of observations only that an action was invalid."""
        if segment.kind == "policy":
            for label, content in self.protocol.split_turn(segment.text):
                self._line(label, content, STYLES.get(label, STYLES["search"]))
        elif self.protocol.invalid.endswith(segment.text):
            self._line("invalid", "no action that the protocol knows; it is told so", "red")

    def show_hits(self, hits: list[Hit]) -> None:
        """Titles and first words."""
        for hit in hits:
            self._line("found", preview(hit), "blue")
        if not hits:
            self._line("found", "nothing", "blue")

    def _line(self, label: str, content: str, style: str) -> None:
        from rich.text import Text  # as Text, square brackets are no markup

        line = Text(f"{label:>8}  ", style="dim").append(visible(content), style=f"not dim {style}")
        self.console.print(line, soft_wrap=not self.console.is_terminal)


def preview(hit: Hit) -> str:
    """Title and first words of a passage."""
    words = " ".join(hit.passage.text.split())
    cut = words if len(words) <= PREVIEW_CHARS else words[:PREVIEW_CHARS].rsplit(" ", 1)[0] + " ..."
    return f"{hit.passage.title or hit.passage.id}: {cut}"
