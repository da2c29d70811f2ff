"""The world that a policy acts in: a question, the tools it may call, and the answer to each action.

environment.reset(question)      the prompt
await environment.step(action)   an observation, or why the trajectory ends
environment.score()              exact match and the like of the answer that was given
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, runtime_checkable
from typing import Protocol as Interface

from agent.prompt import PromptFrame, encode_prompt
from agent.protocol import Action, Answer, Protocol
from agent.query_styles import QUERY_STYLES
from agent.search_tool import Observation, TagSanitizer, find_pictures, observe
from agent.tools import OPEN_PAGE, SEARCH, Call
from agent.trajectory import Ledger, SearchRecord, StopReason
from data.errors import DataError, RetrieverError
from data.metrics.answers import METRICS
from data.records import Hit, Passage, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from agent.vision import Vision

MIN_OBSERVATION_TOKENS = 32
"""With less room than this an observation would be a wrapper around nothing: the trajectory ends."""


class Searcher(Interface):
    """A retriever as the agent needs it, such as `retriever_server.client.search_client.SearchClient`.

    It may also be a `DocumentReader` (for the tool open_page) and a `PictureReader` (for policies that read
    images).
    """

    async def search(self, query: str, k: int) -> list[Hit]: ...


@runtime_checkable
class DocumentReader(Interface):
    """A searcher that reads the documents of passages."""

    async def document(self, passage_id: str) -> Passage | None:
        """Return the document that a passage is from, as one passage; None where there is no such passage."""
        ...


class Environment:
    """The world of one question. A search that fails ends the trajectory; it is never an empty result."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        searcher: Searcher,
        protocol: Protocol,
        frame: PromptFrame,
        sanitize: TagSanitizer,
        vision: Vision | None,
        ledger: Ledger,
    ) -> None:
        """protocol: as `frame` has fitted it. ledger: of the trajectory; what is called is noted there."""
        self.tokenizer, self.protocol, self.frame, self.ledger = tokenizer, protocol, frame, ledger
        self.searcher, self.sanitize, self.vision = searcher, sanitize, vision
        self.question = Question("", "", ())
        self.answer: str | None = None
        self.confidence: float | None = None
        self.turn = self.invalid_actions = 0
        self._encode = partial(tokenizer.encode, add_special_tokens=False)
        self._tools = {SEARCH.name: self._search, OPEN_PAGE.name: self._open_page}

    def reset(self, question: Question) -> Observation:
        """Begin with a question, or go on after the last whole turn in the ledger; return the prompt."""
        self.question, self.answer, self.confidence = question, None, None
        self.turn = self.ledger.rewind()
        self.invalid_actions = self.turn - len(self.ledger.searches)
        asked = self.protocol.prompt(self.sanitize(question.text))
        return Observation(*encode_prompt(asked, self.protocol, self.tokenizer, self.frame))

    async def step(self, action: Action) -> Observation | StopReason:
        """Carry out the action of the last turn in the ledger."""
        self.turn += 1
        if isinstance(action, Answer):
            self.answer, self.confidence = action.text, action.confidence
            return StopReason.ANSWERED
        if self.turn > self.protocol.max_turns:
            return StopReason.TURN_LIMIT
        record, sources = await self._call(action) if isinstance(action, Call) else (None, [])
        if record is None:
            self.invalid_actions += 1
            return self._feedback()
        self.ledger.searches.append(record)
        if record.error is not None:
            return StopReason.SEARCH_FAILED
        written = sum(len(segment.token_ids) for segment in self.ledger.segments)
        room = self.protocol.max_context_tokens - written
        if room < MIN_OBSERVATION_TOKENS:
            return StopReason.TOKEN_LIMIT
        budget = min(self.protocol.max_observation_tokens, room)
        return observe(record.hits, sources, self.protocol, self.sanitize, self._encode, budget, self.vision)

    def score(self) -> dict[str, float]:
        """The scores of the answer by name; 0 without one."""
        asked = self.question
        return {
            name: metric(self.answer, asked.gold_answers, asked.normalizer)
            for name, metric in METRICS.items()
        }

    async def _call(self, call: Call) -> tuple[SearchRecord | None, list[str]]:
        """Call a tool: its record and the pictures found; None where there is no such page."""
        started, error = time.monotonic(), None
        sources: list[str] = []
        try:
            run = self._tools.get(call.tool) or partial(self._ask_server, call.tool)
            hits = await run(call.argument)
            if hits is None:
                return None, []
            if self.vision:
                sources = await find_pictures(hits, self.vision, self.searcher)
        except (RetrieverError, DataError) as failure:
            hits, error = [], f"{type(failure).__name__}: {failure}"
        seconds = time.monotonic() - started
        return SearchRecord(call.argument, hits, seconds, error, self.turn - 1, call.tool), sources

    async def _search(self, query: str) -> list[Hit]:
        asked = [search.query for search in self.ledger.searches if search.tool == SEARCH.name]
        text = QUERY_STYLES[self.protocol.query_style](self.question.text, asked, query)
        return await self.searcher.search(text, self.protocol.top_k)

    async def _open_page(self, place: str) -> list[Hit] | None:
        """The document of a passage: of its number in the last search, else of its id."""
        if not isinstance(self.searcher, DocumentReader):
            raise DataError("open_page: the searcher reads no documents")
        last = next((s.hits for s in reversed(self.ledger.searches) if s.tool == SEARCH.name), [])
        number = int(place) if place.isascii() and place.isdecimal() and len(place) < 10 else 0
        hit = last[number - 1] if 0 < number <= len(last) else None
        page = await self.searcher.document(hit.passage.id if hit else place)
        known = hit or next((h for s in self.ledger.searches for h in s.hits), None)
        return page and [Hit(page, hit.score if hit else 0.0, known.generation if known else "")]

    async def _ask_server(self, name: str, argument: str) -> list[Hit] | None:
        """Return what the tool of an MCP server returns; None for a call too many."""
        server = next(server for server in self.protocol.servers if name in server.names)
        if sum(call.tool in server.names for call in self.ledger.searches) >= server.max_calls:
            return None
        return await server.call(self.protocol.known_tools[name], argument)

    def _feedback(self) -> Observation:
        """The reply to an invalid action; a token that ended the turn is not said a second time."""
        last = self.ledger.segments[-1].token_ids[-1:]
        ended = bool(last) and last[0] in self.tokenizer.added_tokens_decoder
        said = str(self.tokenizer.decode(last, skip_special_tokens=False)) if ended else ""
        text = self.protocol.invalid.removeprefix(said)
        return Observation(text, self._encode(text))
