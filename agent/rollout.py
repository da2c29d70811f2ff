"""Questions -> trajectories. Every trajectory is its own coroutine; none waits for another's turn.

The loop of one trajectory is `Agent._roll_out`: the engine completes a turn, the episode takes it
and replies, until there is an answer or a limit is met.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

from agent.engines.base import Completion, Engine, FinishReason, Sampling
from agent.environment import Environment, Searcher
from agent.prompt import PromptFrame, make_frame
from agent.protocol import Action, Invalid, Protocol
from agent.search_tool import TagSanitizer
from agent.trajectory import Ledger, Segment, SegmentKind, StopReason, Trajectory
from data.errors import EngineError
from data.records import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from agent.vision import Vision

_NUMBERS = itertools.count()


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

    def __post_init__(self) -> None:
        self.sampling.check()

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
        episode = Episode(self, question, ledger, on_segment)
        trajectory_id = f"{question.id}/{seed:016x}/{next(_NUMBERS)}"  # a question may be asked twice at once
        try:
            while episode.outcome is None:
                sampling = replace(self.turn_sampling, seed=(seed + episode.environment.turn) % 2**63)
                shown = (pictures,) if self.vision and (pictures := ledger.pictures) else ()
                await episode.take(
                    await self.engine.generate(episode.context_ids, sampling, trajectory_id, *shown)
                )
        finally:
            await self.engine.release(trajectory_id)
        return episode.trajectory

    def read_action(self, token_ids: list[int]) -> Action:
        """The action in a turn."""
        return self.spoken.parse(self.decode(token_ids))

    def without_end(self, completion: Completion) -> Completion:
        """The completion less the special tokens at its end: the same message goes on with the feedback."""
        kept = len(completion.token_ids)
        while kept and completion.token_ids[kept - 1] in self.special_ids:
            kept -= 1
        return replace(completion, token_ids=completion.token_ids[:kept], logprobs=completion.logprobs[:kept])

    def decode(self, token_ids: list[int]) -> str:
        """Their text, special tokens included."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=False))


class Episode:
    """A trajectory as it grows, whoever writes its turns: an engine, or another trainer.

    episode = Episode(agent, question)        what is read first is in episode.text
    await episode.write(turn)                 what is read next is; until episode.outcome says why it ended
    episode.trajectory                        for the rewards
    """

    def __init__(
        self,
        agent: Agent,
        question: Question,
        ledger: Ledger | None = None,
        on_segment: Callable[[Segment], None] = lambda segment: None,
    ) -> None:
        """ledger: where it is written, after the whole turns found there."""
        self.agent, self.question, self.ledger = agent, question, ledger or Ledger()
        self.outcome: StopReason | None = None
        """Stop reason; None while another turn may be written."""
        self.context_ids: list[int] = []
        """Tokens that the next turn continues."""
        self._on_segment, self._started = on_segment, time.monotonic()
        world = (agent.tokenizer, agent.searcher, agent.spoken, agent.frame, agent.sanitize, agent.vision)
        self.environment = Environment(*world, self.ledger)
        prompt = self.environment.reset(question)
        if not self.ledger.segments:
            self._add(Segment(SegmentKind.PROMPT, prompt.token_ids, prompt.text))
        self._check_room()

    @property
    def text(self) -> str:
        """Text that was read or written last, such as the prompt or an observation."""
        return self.ledger.segments[-1].text

    async def write(self, turn: str | Sequence[int]) -> None:
        """Add a turn that was sampled elsewhere, its text or its token ids, and what it is answered.

        The mark that ends a message is left off after an action: the observation begins with it.
        """
        encode = self.agent.tokenizer.encode
        ids = encode(turn, add_special_tokens=False) if isinstance(turn, str) else list(turn)
        completion = Completion(ids, [None] * len(ids), FinishReason.STOP, 0)
        acts = not isinstance(self.agent.read_action(ids), Invalid)
        await self.take(self.agent.without_end(completion) if acts else completion)

    async def take(self, completion: Completion) -> None:
        """Add a turn and the reply to it; `outcome` is set where there is none."""
        agent = self.agent
        action = agent.read_action(completion.token_ids)
        last = self.environment.turn >= agent.spoken.max_turns
        if isinstance(action, Invalid) and not last and not agent.spoken.keeps_eos:
            completion = agent.without_end(completion)
        text, written = agent.decode(completion.token_ids), (completion.logprobs, completion.weights_version)
        self._add(Segment(SegmentKind.POLICY, completion.token_ids, text, *written))
        reply = await self.environment.step(action)
        if isinstance(reply, StopReason):
            self.outcome = reply
            return
        self._add(Segment(SegmentKind.OBSERVATION, reply.token_ids, reply.text, pictures=reply.pictures))
        self._check_room()

    @property
    def trajectory(self) -> Trajectory:
        """Trajectory as it is; one that is not over would end for want of tokens."""
        environment = self.environment
        return Trajectory(
            question=self.question,
            segments=self.ledger.segments,
            stop_reason=self.outcome or StopReason.TOKEN_LIMIT,
            answer=environment.answer,
            searches=self.ledger.searches,
            invalid_actions=environment.invalid_actions,
            valid_format=environment.answer is not None and _well_formed(self.ledger, self.agent.spoken),
            confidence=environment.confidence,
            seconds=time.monotonic() - self._started,
        )

    def _add(self, segment: Segment) -> None:
        self.ledger.segments.append(segment)
        self._on_segment(segment)

    def _check_room(self) -> None:
        self.context_ids = self.ledger.token_ids
        if len(self.context_ids) > self.agent.spoken.max_context_tokens:
            self.outcome = StopReason.TOKEN_LIMIT


class Elsewhere(Engine):
    """The engine of an agent whose turns another trainer samples: it has none to give."""

    async def generate(
        self, prompt_ids: list[int], sampling: Sampling, trajectory_id: str, pictures: object = ()
    ) -> Completion:
        raise EngineError("this agent's turns are sampled elsewhere: see Episode.write")

    async def update_weights(self, state: object, version: int) -> None:
        """There are none here."""


def _well_formed(ledger: Ledger, protocol: Protocol) -> bool:
    return all(
        protocol.is_well_formed(turn.text, before.text)
        for before, turn in pairwise(ledger.segments)
        if turn.kind is SegmentKind.POLICY
    )
