"""Questions -> trajectories. Every trajectory is its own coroutine; none waits for another's turn.

The loop of one trajectory is `_Episode.run`: complete a turn, parse it, act, observe, until an answer
or a limit. A failed search ends the trajectory as SEARCH_FAILED; it never becomes an empty result.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import pairwise
from typing import TYPE_CHECKING
from typing import Protocol as Interface

from agent.engines.base import Completion, Engine, Sampling
from agent.observation import Observation, find_pictures, lay_out
from agent.prompt import PromptFrame, encode_prompt, make_frame
from agent.protocol import Action, Answer, Invalid, Protocol, Search
from agent.search_tool import PICTURE, Neutraliser, render_hits
from agent.trajectory import Ledger, Picture, SearchRecord, Segment, SegmentKind, StopReason, Trajectory
from data.errors import DataError, RetrieverError
from data.records import Hit, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from agent.vision import Vision

logger = logging.getLogger(__name__)

MIN_OBSERVATION_TOKENS = 32
"""With less room than this an observation would be a wrapper around nothing: the trajectory ends."""

_EPISODES = itertools.count()


class Searcher(Interface):
    """What the agent needs of a retriever; `retriever_server.client.search_client.SearchClient` is one."""

    async def search(self, query: str, k: int) -> list[Hit]:
        """The best `k` passages of one query."""
        ...


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
    """Of a policy that is shown the pictures of passages; without, it reads what is written about them."""
    prompt_frame: PromptFrame | None = None
    """What stands around the instruction, as the run keeps it; None: as the chat template makes it now."""

    @cached_property
    def neutralise(self) -> Neutraliser:
        """Defuses what speaks the protocol or is an added token of the tokenizer."""
        return Neutraliser(self.protocol, [str(t) for t in self.tokenizer.added_tokens_decoder.values()])

    @cached_property
    def frame(self) -> PromptFrame:
        """What stands around the instruction."""
        return self.prompt_frame or make_frame(self.protocol, self.tokenizer)

    @cached_property
    def spoken(self) -> Protocol:
        """The protocol in the policy's chat template."""
        return self.frame.fit(self.protocol)

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
                episode = _Episode(self, question, number, on_segment, ledger)
                trajectory = await episode.run()
                on_finished(index, trajectory)
                return trajectory

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(run(i, q)) for i, q in enumerate(questions)]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None  # the rest were cancelled, or failed for the same reason
        return [task.result() for task in tasks]


class _Episode:
    """The state of one rollout: the ledger so far."""

    def __init__(
        self,
        agent: Agent,
        question: Question,
        seed: int,
        on_segment: Callable[[Segment], None],
        ledger: Ledger,
    ) -> None:
        self.agent, self.question, self.seed, self.on_segment = agent, question, seed, on_segment
        self.protocol = agent.spoken
        self.segments, self.searches = ledger.segments, ledger.searches
        self.token_ids: list[int] = []
        self.pictures: list[Picture] = []
        self.sources: list[str] = []  # of the pictures that the last search found
        self.turns: list[str] = []
        self.invalid_actions = 0
        self._take_up()

    def _take_up(self) -> None:
        """Go on after the last observation; a turn that has none yet is written again."""
        found = self.segments[:]
        self.segments.clear()
        if found and found[-1].kind is SegmentKind.POLICY:
            found.pop()
        for segment in found:
            self._add(segment)
        self.turns = [segment.text for segment in found if segment.kind is SegmentKind.POLICY]
        self.searches[:] = [search for search in self.searches if search.turn < len(self.turns)]
        self.invalid_actions = len(self.turns) - len(self.searches)

    async def run(self) -> Trajectory:
        trajectory_id = f"{self.question.id}/{self.seed:016x}/{next(_EPISODES)}"  # may be asked twice at once
        try:
            return await self._turns(trajectory_id)
        finally:
            await self.agent.engine.release(trajectory_id)

    async def _turns(self, trajectory_id: str) -> Trajectory:
        if not self.segments:
            prompt = self.protocol.prompt(self.agent.neutralise(self.question.text))
            prompt, ids = encode_prompt(prompt, self.protocol, self.agent.tokenizer, self.agent.frame)
            self._append(SegmentKind.PROMPT, prompt, ids)
        for turn in range(len(self.turns), self.protocol.max_turns + 1):
            if self._room < 0:
                return self._finish(StopReason.TOKEN_LIMIT)
            match await self._complete(trajectory_id, turn):
                case Answer(text):
                    return self._finish(StopReason.ANSWERED, text)
                case _ if turn == self.protocol.max_turns:
                    return self._finish(StopReason.TURN_LIMIT)
                case Search(query):
                    record = await self._search(query)
                    if record.error is not None:
                        return self._finish(StopReason.SEARCH_FAILED)
                    if self._room < MIN_OBSERVATION_TOKENS:
                        return self._finish(StopReason.TOKEN_LIMIT)
                    observation = self._observation(record.hits)
                case Invalid():
                    self.invalid_actions += 1
                    observation = self._feedback()
            shown = observation.pictures
            self._append(SegmentKind.OBSERVATION, observation.text, observation.token_ids, pictures=shown)
        raise AssertionError("the last turn always returns")

    async def _complete(self, trajectory_id: str, turn: int) -> Action:
        sampling = replace(
            self.agent.sampling,
            max_tokens=self.protocol.max_response_tokens,
            stop=self.protocol.stop,
            seed=(self.seed + turn) % 2**63,
        )
        shown = (self.pictures,) if self.pictures else ()
        completion = await self.agent.engine.generate(self.token_ids, sampling, trajectory_id, *shown)
        action = self.protocol.parse(self._decode(completion.token_ids))
        if isinstance(action, Invalid) and turn < self.protocol.max_turns and not self.protocol.keeps_eos:
            completion = self._without_end(completion)
        self._append(
            SegmentKind.POLICY,
            self._decode(completion.token_ids),
            completion.token_ids,
            completion.logprobs,
            completion.weights_version,
        )
        self.turns.append(self.segments[-1].text)
        return action

    def _without_end(self, completion: Completion) -> Completion:
        """The completion less the special tokens at its end: the same message goes on with the feedback."""
        kept = len(completion.token_ids)
        while kept and completion.token_ids[kept - 1] in self.agent.special_ids:
            kept -= 1
        return replace(completion, token_ids=completion.token_ids[:kept], logprobs=completion.logprobs[:kept])

    def _feedback(self) -> Observation:
        """What an invalid action is answered with; a token that ended the turn is not said a second time."""
        last = self._decode(self.token_ids[-1:])
        ended = last if self.token_ids[-1] in self.agent.tokenizer.added_tokens_decoder else ""
        text = self.protocol.invalid.removeprefix(ended)
        return Observation(text, self._encode(text))

    async def _search(self, query: str) -> SearchRecord:
        started = time.monotonic()
        try:
            hits, error = await self.agent.searcher.search(query, self.protocol.top_k), None
            self.sources = await find_pictures(hits, self.agent.vision, self.agent.searcher)
        except (RetrieverError, DataError) as failure:
            hits, error = [], f"{type(failure).__name__}: {failure}"
        self.searches.append(
            SearchRecord(query, hits, time.monotonic() - started, error, len(self.turns) - 1)
        )
        return self.searches[-1]

    @property
    def _room(self) -> int:
        return self.protocol.max_context_tokens - len(self.token_ids)

    def _observation(self, hits: list[Hit]) -> Observation:
        budget = min(self.protocol.max_observation_tokens, self._room)
        laid: dict[str, Observation] = {}

        def encode(text: str) -> list[int]:
            laid[text] = self._lay_out(text)
            return laid[text].token_ids

        neutralise, sees = self.agent.neutralise, bool(self.sources)
        text = render_hits(hits, self.protocol, neutralise, encode, budget, sees)
        if text.count(PICTURE) < len(self.sources):
            _warn_of_pictures_left_out()
        return laid.get(text) or self._lay_out(text)

    def _lay_out(self, text: str) -> Observation:
        return lay_out(text, self.sources, self._encode, self.agent.vision)

    def _decode(self, token_ids: list[int]) -> str:
        return str(self.agent.tokenizer.decode(token_ids, skip_special_tokens=False))

    def _encode(self, text: str) -> list[int]:
        return self.agent.tokenizer.encode(text, add_special_tokens=False)

    def _append(
        self,
        kind: SegmentKind,
        text: str,
        token_ids: list[int],
        logprobs: list[float | None] | None = None,
        weights_version: int = 0,
        pictures: tuple[Picture, ...] = (),
    ) -> None:
        self._add(Segment(kind, token_ids, text, logprobs, weights_version, pictures))
        self.on_segment(self.segments[-1])

    def _add(self, segment: Segment) -> None:
        self.segments.append(segment)
        start = len(self.token_ids)
        self.pictures += [replace(picture, start=start + picture.start) for picture in segment.pictures]
        self.token_ids = self.token_ids + segment.token_ids

    def _finish(self, reason: StopReason, answer: str | None = None) -> Trajectory:
        well_formed = all(
            self.protocol.is_well_formed(turn.text, before.text)
            for before, turn in pairwise(self.segments)
            if turn.kind is SegmentKind.POLICY
        )
        return Trajectory(
            question=self.question,
            segments=self.segments,
            stop_reason=reason,
            answer=answer,
            searches=self.searches,
            invalid_actions=self.invalid_actions,
            valid_format=answer is not None and well_formed,
        )


@cache
def _warn_of_pictures_left_out() -> None:
    logger.warning("no room for every picture found: raise protocol.max_observation_tokens (said once)")
