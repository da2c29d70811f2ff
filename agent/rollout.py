"""Questions -> trajectories. Every trajectory is its own coroutine; none waits for another's turn.

The loop of one trajectory is `Agent._roll_out`: the engine completes a turn, the environment replies, until
there is an answer or a limit is met.

environment.reset(question)      the prompt
await environment.step(action)   an observation, or why the trajectory ends
environment.score()              exact match and the like of the answer that was given
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from typing import Protocol as Interface

from agent.engines.base import Completion, Engine, Sampling
from agent.prompt import PromptFrame, encode_prompt, make_frame
from agent.protocol import Action, Answer, Invalid, Protocol
from agent.query_styles import QUERY_STYLES
from agent.search_tool import Observation, TagSanitizer, find_pictures, observe
from agent.tools import OPEN_PAGE, SEARCH, Call
from agent.trajectory import SearchRecord, Segment, SegmentKind, Segments, StopReason, Trajectory
from data.answers import METRICS
from data.errors import DataError, RetrieverError
from data.records import Hit, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from agent.vision import Vision

MIN_OBSERVATION_TOKENS = 32
"""With less room than this an observation would be a wrapper around nothing: the trajectory ends."""
_NUMBERS = itertools.count()


class Searcher(Interface):
    """A retriever as the agent needs it, such as `retriever_server.client.search_client.SearchClient`.

    It may also have `picture` (for policies that read images) and `document` (for the tool open_page).
    """

    async def search(self, query: str, k: int) -> list[Hit]:
        """Return the best `k` passages of one query."""
        ...


@dataclass(eq=False)
class Ledger(Segments):
    """A trajectory while it grows; a rollout that is given one goes on from there."""

    segments: list[Segment] = field(default_factory=list)
    searches: list[SearchRecord] = field(default_factory=list)

    @property
    def turns(self) -> int:
        """Turns that the policy has written."""
        return sum(segment.kind is SegmentKind.POLICY for segment in self.segments)

    def rewind(self) -> None:
        """Go back to the last observation: a turn that has none yet is written again."""
        if self.segments and self.segments[-1].kind is SegmentKind.POLICY:
            self.segments.pop()
        self.searches[:] = [search for search in self.searches if search.turn < self.turns]


@dataclass(frozen=True)
class Agent:
    """A policy behind an engine, with the retriever it may ask and the protocol it speaks."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    searcher: Searcher
    protocol: Protocol
    sampling: Sampling = field(default_factory=Sampling)
    max_live: int = 256
    """Trajectories alive at once; the engine may admit fewer."""
    vision: Vision | None = None
    """For a policy that is shown the images of passages; without, it reads the text about them."""
    prompt_frame: PromptFrame | None = None
    """The text around the instruction, as the run keeps it; None: as the chat template makes it now."""

    @cached_property
    def sanitize(self) -> TagSanitizer:
        """Takes the brackets off tags of the protocol and added tokens of the tokenizer."""
        return TagSanitizer(self.protocol, [str(t) for t in self.tokenizer.added_tokens_decoder.values()])

    @cached_property
    def frame(self) -> PromptFrame:
        """The text around the instruction."""
        return self.prompt_frame or make_frame(self.protocol, self.tokenizer)

    @cached_property
    def spoken(self) -> Protocol:
        """The protocol in the policy's chat template."""
        return self.frame.fit(self.protocol)

    @cached_property
    def turn_sampling(self) -> Sampling:
        """The sampling of one turn, but for its seed."""
        limits = {"max_tokens": self.spoken.max_response_tokens, "stop": self.spoken.stop}
        return replace(self.sampling, **limits)

    @cached_property
    def special_ids(self) -> set[int]:
        """The tokens that decoding without special tokens leaves out."""
        added = self.tokenizer.added_tokens_decoder.items()
        return {id_ for id_, token in added if token.special} | set(self.tokenizer.all_special_ids)

    async def rollout(
        self,
        questions: Sequence[Question],
        seed: int = 0,
        on_finished: Callable[[int, Trajectory], None] = lambda index, trajectory: None,
        on_segment: Callable[[Segment], None] = lambda segment: None,
        keys: Sequence[int] | None = None,
        ledgers: Sequence[Ledger] | None = None,
    ) -> list[Trajectory]:
        """One trajectory a question, in the order of the questions; repeat a question for a group.

        The i-th trajectory draws from a generator of its own, made of `seed`, its question and keys[i]
        (i, where there are no keys), so that a part of a batch is sampled as within the whole. It is
        written into ledgers[i], after the whole turns found there. The first failure, of the engine or
        of a callback, ends all and is raised as it is.
        """
        admitted = asyncio.Semaphore(self.max_live)

        async def run(index: int, question: Question) -> Trajectory:
            async with admitted:
                key = f"{seed}/{keys[index] if keys else index}/{question.id}"
                generator = hashlib.blake2b(key.encode(), digest_size=8)
                ledger = ledgers[index] if ledgers else Ledger()
                number = int.from_bytes(generator.digest(), "big")
                trajectory = await self._roll_out(question, number, ledger, on_segment)
                on_finished(index, trajectory)
                return trajectory

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(run(i, q)) for i, q in enumerate(questions)]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None  # the rest were cancelled, or failed for the same reason
        return [task.result() for task in tasks]

    async def _roll_out(
        self, question: Question, seed: int, ledger: Ledger, on_segment: Callable[[Segment], None]
    ) -> Trajectory:
        def add(segment: Segment) -> None:
            ledger.segments.append(segment)
            on_segment(segment)

        ledger.rewind()
        environment = Environment(self, ledger)
        prompt = environment.reset(question)
        if not ledger.segments:
            add(Segment(SegmentKind.PROMPT, prompt.token_ids, prompt.text))
        outcome, started = StopReason.TOKEN_LIMIT, time.monotonic()
        trajectory_id = f"{question.id}/{seed:016x}/{next(_NUMBERS)}"  # a question may be asked twice at once
        try:
            while environment.room >= 0:
                turn, action = await self._complete(ledger, seed, trajectory_id)
                add(turn)
                outcome = await environment.step(action)
                if isinstance(outcome, StopReason):
                    break
                read = outcome.token_ids, outcome.text
                add(Segment(SegmentKind.OBSERVATION, *read, pictures=outcome.pictures))
        finally:
            await self.engine.release(trajectory_id)
        return Trajectory(
            question=question,
            segments=ledger.segments,
            stop_reason=outcome if isinstance(outcome, StopReason) else StopReason.TOKEN_LIMIT,
            answer=environment.answer,
            searches=ledger.searches,
            invalid_actions=environment.invalid_actions,
            valid_format=environment.answer is not None and _well_formed(ledger, self.spoken),
            confidence=environment.confidence,
            seconds=time.monotonic() - started,
        )

    async def _complete(self, ledger: Ledger, seed: int, trajectory_id: str) -> tuple[Segment, Action]:
        """The policy's next turn, and the action in it."""
        protocol, turn = self.spoken, ledger.turns
        sampling = replace(self.turn_sampling, seed=(seed + turn) % 2**63)
        shown = (pictures,) if self.vision and (pictures := ledger.pictures) else ()
        completion = await self.engine.generate(ledger.token_ids, sampling, trajectory_id, *shown)
        action = protocol.parse(self._decode(completion.token_ids))
        if isinstance(action, Invalid) and turn < protocol.max_turns and not protocol.keeps_eos:
            completion = self._without_end(completion)
        text, written = self._decode(completion.token_ids), (completion.logprobs, completion.weights_version)
        return Segment(SegmentKind.POLICY, completion.token_ids, text, *written), action

    def _without_end(self, completion: Completion) -> Completion:
        """The completion less the special tokens at its end: the same message goes on with the feedback."""
        kept = len(completion.token_ids)
        while kept and completion.token_ids[kept - 1] in self.special_ids:
            kept -= 1
        return replace(completion, token_ids=completion.token_ids[:kept], logprobs=completion.logprobs[:kept])

    def _decode(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=False))


class Environment:
    """The world of one question. A search that fails ends the trajectory; it is never an empty result."""

    def __init__(self, agent: Agent, ledger: Ledger) -> None:
        """ledger: of the trajectory; what is called is noted there."""
        self.agent, self.protocol, self.ledger = agent, agent.spoken, ledger
        self.searcher: Any = agent.searcher
        self.question = Question("", "", ())
        self.answer: str | None = None
        self.confidence: float | None = None
        self.invalid_actions = ledger.turns - len(ledger.searches)
        self._encode = partial(agent.tokenizer.encode, add_special_tokens=False)
        self._tools = {SEARCH.name: self._search, OPEN_PAGE.name: self._open_page}

    @property
    def room(self) -> int:
        """Tokens that the context still takes; less than 0: no turn may follow."""
        written = sum(len(segment.token_ids) for segment in self.ledger.segments)
        return self.protocol.max_context_tokens - written

    def reset(self, question: Question) -> Observation:
        """Begin with a question; the prompt."""
        self.question, self.answer, self.confidence = question, None, None
        agent, text = self.agent, self.protocol.prompt(self.agent.sanitize(question.text))
        return Observation(*encode_prompt(text, self.protocol, agent.tokenizer, agent.frame))

    async def step(self, action: Action) -> Observation | StopReason:
        """Carry out the action of the last turn in the ledger."""
        if isinstance(action, Answer):
            self.answer, self.confidence = action.text, action.confidence
            return StopReason.ANSWERED
        if self.ledger.turns > self.protocol.max_turns:
            return StopReason.TURN_LIMIT
        record, sources = await self._call(action) if isinstance(action, Call) else (None, [])
        if record is None:
            self.invalid_actions += 1
            return self._feedback()
        self.ledger.searches.append(record)
        if record.error is not None:
            return StopReason.SEARCH_FAILED
        if self.room < MIN_OBSERVATION_TOKENS:
            return StopReason.TOKEN_LIMIT
        budget = min(self.protocol.max_observation_tokens, self.room)
        sanitize, vision = self.agent.sanitize, self.agent.vision
        return observe(record.hits, sources, self.protocol, sanitize, self._encode, budget, vision)

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
            hits = await self._tools[call.tool](call.argument)
            if hits is None:
                return None, []
            if vision := self.agent.vision:
                sources = await find_pictures(hits, vision, self.searcher)
        except (RetrieverError, DataError) as failure:
            hits, error = [], f"{type(failure).__name__}: {failure}"
        seconds, turn = time.monotonic() - started, self.ledger.turns - 1
        return SearchRecord(call.argument, hits, seconds, error, turn, call.tool), sources

    async def _search(self, query: str) -> list[Hit]:
        asked = [search.query for search in self.ledger.searches if search.tool == SEARCH.name]
        text = QUERY_STYLES[self.protocol.query_style](self.question.text, asked, query)
        return await self.searcher.search(text, self.protocol.top_k)

    async def _open_page(self, place: str) -> list[Hit] | None:
        """The document of a passage: of its number in the last search, else of its id."""
        if not hasattr(self.searcher, "document"):
            raise DataError("open_page: the searcher reads no documents")
        last = next((s.hits for s in reversed(self.ledger.searches) if s.tool == SEARCH.name), [])
        number = int(place) if place.isascii() and place.isdecimal() and len(place) < 10 else 0
        hit = last[number - 1] if 0 < number <= len(last) else None
        page = await self.searcher.document(hit.passage.id if hit else place)
        known = hit or next((h for s in self.ledger.searches for h in s.hits), None)
        return page and [Hit(page, hit.score if hit else 0.0, known.generation if known else "")]

    def _feedback(self) -> Observation:
        """The reply to an invalid action; a token that ended the turn is not said a second time."""
        last = self.ledger.segments[-1].token_ids[-1:]
        ended = bool(last) and last[0] in self.agent.tokenizer.added_tokens_decoder
        said = str(self.agent.tokenizer.decode(last, skip_special_tokens=False)) if ended else ""
        text = self.protocol.invalid.removeprefix(said)
        return Observation(text, self._encode(text))


def _well_formed(ledger: Ledger, protocol: Protocol) -> bool:
    return all(
        protocol.is_well_formed(turn.text, before.text)
        for before, turn in pairwise(ledger.segments)
        if turn.kind is SegmentKind.POLICY
    )
