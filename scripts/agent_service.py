"""Questions to a policy that searches, as OpenAI's chat completions ask them, and its answers part by part.

All questions share one engine, in which each has a place until it is answered, or its client has gone.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from pydantic import Field

from agent.engines.base import Completion, Sampling
from agent.trajectory import Ledger, SearchRecord, Segment, SegmentKind, Trajectory
from data.errors import DataError, RetrieverError
from data.metrics.answers import cover_em
from data.records import Question
from data.text import replace_halves
from retriever_server.server.batching import Overloaded
from retriever_server.server.metrics import Metrics
from retriever_server.server.schema import Body

if TYPE_CHECKING:
    from agent.protocol import Protocol
    from agent.rollout import Agent
    from scripts.agent_options import AgentLimits


_NOT_TAKEN = ("tools", "functions", "stop", "logprobs", "frequency_penalty", "presence_penalty", "logit_bias")


class TextPart(Body):
    """A part of a message that is a text."""

    type: str
    text: str = ""


class Message(Body):
    """A message of the conversation."""

    role: str
    content: str | list[TextPart] | None = None

    @property
    def text(self) -> str:
        """Return its text; DataError for what is none."""
        if isinstance(self.content, list):
            if odd := next((part.type for part in self.content if part.type != "text"), None):
                raise DataError(f"messages: a part of type {odd[:40]!r}; the policy is asked by text alone")
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool = False


class ChatBody(Body):
    """A request of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=1, description="One answer a question.")
    tools: Any = Field(None, description="None: the policy has its own; likewise all below.")
    functions: Any = None
    stop: Any = None
    logprobs: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    response_format: Any = None

    def question(self, most_chars: int) -> str:
        """Return what is asked: the last message. What came before it, the policy does not read."""
        text_alone = self.response_format in (None, {"type": "text"})
        asked = {name: getattr(self, name) for name in _NOT_TAKEN} | {"response_format": not text_alone}
        if odd := next((name for name, value in asked.items() if value), None):
            raise DataError(f"{odd}: is not taken: the policy has its own tools, stops and form of answers")
        last = self.messages[-1]
        if last.role != "user":
            raise DataError(f"messages: the last is of role {last.role[:40]!r}, must be user: the question")
        text = replace_halves(last.text).strip()
        if not 0 < len(text) <= most_chars:
            raise DataError(f"messages: a question of {len(text)} characters, allowed are 1 to {most_chars}")
        return text


class OutOfTokens(Exception):
    """The policy has written as many tokens as it may."""


class _Metered:
    """The engine as one question sees it, with so many tokens left; what it writes is told as it grows."""

    def __init__(self, engine: Any, tokens: int, tell: Callable[[list[int]], None] | None) -> None:
        self._engine, self._left, self._tell = engine, tokens, tell
        self.release = engine.release

    async def generate(
        self, prompt_ids: list[int], sampling: Sampling, trajectory_id: str, *more: Any
    ) -> Completion:
        if self._left < 1:
            raise OutOfTokens
        if self._tell:
            self._engine.watch(trajectory_id, self._tell)
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, self._left))
        completion = await self._engine.generate(prompt_ids, sampling, trajectory_id, *more)
        self._left -= len(completion.token_ids)
        return completion


class AgentService:
    """The agent, and the places in which questions are worked on."""

    def __init__(self, agent: Agent, name: str, limits: AgentLimits) -> None:
        self.agent, self.name, self.limits = agent, name, limits
        self.metrics, self.waiting, self.stopping = Metrics(), 0, False
        self._places = asyncio.Semaphore(limits.concurrency)

    def check_health(self) -> bool:
        """Return whether it is well, for `run_until_stopped`."""
        return True

    def check(self, body: ChatBody) -> None:
        """Raise DataError for a request that asks for what is not done, Overloaded where too many wait."""
        body.question(self.limits.max_question_chars)
        if self._places.locked() and self.waiting >= self.limits.max_waiting:
            raise Overloaded(f"{self.waiting} questions are waiting", 5)

    async def answer(self, body: ChatBody, on_part: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Return the answer of a request, and its usage; each part of the message is told as it comes."""
        question = Question("chat", body.question(self.limits.max_question_chars), ())
        parts = _Parts(self.agent.spoken, on_part)
        with self._counted():
            await self._places.acquire()
        try:
            agent, seed = self._agent_for(body, parts), uuid.uuid4().int if body.seed is None else body.seed
            asked = agent.rollout([question], seed, on_segment=parts.add, ledgers=[parts.ledger])
            [trajectory] = await asked
        except OutOfTokens:
            trajectory = None
        finally:
            self._places.release()
        return parts.finish(trajectory)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    def _agent_for(self, body: ChatBody, parts: _Parts) -> Agent:
        asked = {"temperature": body.temperature, "top_p": body.top_p}
        given = {name: value for name, value in asked.items() if value is not None}
        tokens = min(body.max_completion_tokens or body.max_tokens or 1 << 31, self.limits.max_tokens)

        def tell(written: list[int]) -> None:
            if written[-1] not in self.agent.special_ids:
                parts.write(self.agent.decode(written))

        engine = cast(Any, _Metered(self.agent.engine, tokens, tell if body.stream else None))
        return replace(self.agent, engine=engine, sampling=replace(self.agent.sampling, **given))


class _Parts:
    def __init__(self, protocol: Protocol, tell: Callable[[dict[str, Any]], None]) -> None:
        self.ledger = Ledger()
        self._protocol, self._tell, self._told = protocol, tell, 0
        self._thoughts: list[str] = []
        self._begun = ""

    def write(self, turn: str) -> None:
        """Tell what a turn thinks that is still being written."""
        self._think(re.sub(r"(<[^>]*|\ufffd+)\Z", "", turn))  # less half a tag, or half a character

    def _think(self, turn: str, end: str = "") -> list[str]:
        thoughts = [each for label, each in self._protocol.split_turn(turn) if label in ("thought", "text")]
        said = "\n".join(thoughts) + end if thoughts else ""
        if new := said.removeprefix(self._begun):
            self._tell({"reasoning_content": new})
        self._begun = said
        return thoughts

    def add(self, segment: Segment) -> None:
        """Tell what a turn thought; what its search found is known when the observation comes."""
        self._tell_searches()
        if segment.kind == "policy":
            self._thoughts += self._think(segment.text, end="\n")
            self._begun = ""

    def finish(self, trajectory: Trajectory | None) -> dict[str, Any]:
        """Tell the answer and return all; raises RetrieverError where a search failed."""
        self._tell_searches()
        if self.ledger.searches and (error := self.ledger.searches[-1].error):
            raise RetrieverError(error)
        answer = trajectory and trajectory.answer
        cited = [] if answer is None else _citations(answer, self.ledger)
        said = {"content": answer, "citations": cited}
        if trajectory and trajectory.confidence is not None:
            said["confidence"] = trajectory.confidence
        self._tell(said)
        sizes = [(segment.kind, len(segment.token_ids)) for segment in self.ledger.segments]
        written = sum(size for kind, size in sizes if kind is SegmentKind.POLICY)
        total = sum(size for _, size in sizes)
        return {
            "message": {
                "role": "assistant",
                **said,
                "reasoning_content": "\n".join(self._thoughts),
                "searches": [_render_search(search) for search in self.ledger.searches],
            },
            "finish_reason": "length" if answer is None else "stop",
            "stop_reason": trajectory.stop_reason if trajectory else "token_limit",
            "usage": {"prompt_tokens": total - written, "completion_tokens": written, "total_tokens": total},
        }

    def _tell_searches(self) -> None:
        new = self.ledger.searches[self._told :]
        self._told += len(new)
        if new:
            self._tell({"searches": [_render_search(search) for search in new]})


def _render_search(search: SearchRecord) -> dict[str, Any]:
    passages = [
        {
            "id": hit.passage.id,
            "title": hit.passage.title,
            "text": hit.passage.text,
            "url": str(hit.passage.metadata.get("url") or ""),
            "score": hit.score,
            "generation": hit.generation,
        }
        for hit in search.hits
    ]
    return {"query": search.query, "tool": search.tool, "passages": passages, "seconds": search.seconds}


def _citations(answer: str, ledger: Ledger) -> list[str]:
    """Return the ids of the passages that the last turn names in square brackets, else of those that hold
    the answer."""
    found = {hit.passage.id: hit.passage for search in ledger.searches for hit in search.hits}
    inside = re.findall(r"[\[【]([^\[\]【】]*)[\]】]", ledger.segments[-1].text)
    named = {each.strip() for text in inside for each in re.split(r"[,;]", text)}
    cited = [id_ for id_ in found if id_ in named]
    return cited or [id_ for id_, passage in found.items() if cover_em(passage.contents, [answer])]
