"""Questions -> trajectories. Every trajectory is its own coroutine; none waits for another's turn.

The loop of one trajectory is `Agent._roll_out`: the engine completes a turn, the environment replies, until
there is an answer or a limit is met.
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

from agent.engines.base import Completion, Engine, Sampling
from agent.environment import Environment, Searcher
from agent.prompt import PromptFrame, make_frame
from agent.protocol import Action, Invalid, Protocol
from agent.search_tool import TagSanitizer
from agent.trajectory import Ledger, Segment, SegmentKind, StopReason, Trajectory
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
        def add(segment: Segment) -> None:
            ledger.segments.append(segment)
            on_segment(segment)

        world = (self.tokenizer, self.searcher, self.spoken, self.frame, self.sanitize, self.vision)
        environment = Environment(*world, ledger)
        prompt = environment.reset(question)
        if not ledger.segments:
            add(Segment(SegmentKind.PROMPT, prompt.token_ids, prompt.text))
        outcome, started = StopReason.TOKEN_LIMIT, time.monotonic()
        trajectory_id = f"{question.id}/{seed:016x}/{next(_NUMBERS)}"  # a question may be asked twice at once
        try:
            while len(token_ids := ledger.token_ids) <= self.spoken.max_context_tokens:
                number = environment.turn
                turn, action = await self._complete(ledger, token_ids, number, seed, trajectory_id)
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

    async def _complete(
        self, ledger: Ledger, token_ids: list[int], turn: int, seed: int, trajectory_id: str
    ) -> tuple[Segment, Action]:
        """The policy's turn of this number after `token_ids`, those of the ledger; and the action in it."""
        protocol = self.spoken
        sampling = replace(self.turn_sampling, seed=(seed + turn) % 2**63)
        shown = (pictures,) if self.vision and (pictures := ledger.pictures) else ()
        completion = await self.engine.generate(token_ids, sampling, trajectory_id, *shown)
        action = self.read_action(completion.token_ids)
        if isinstance(action, Invalid) and turn < protocol.max_turns and not protocol.keeps_eos:
            completion = self._without_end(completion)
        text, written = self._decode(completion.token_ids), (completion.logprobs, completion.weights_version)
        return Segment(SegmentKind.POLICY, completion.token_ids, text, *written), action

    def read_action(self, token_ids: list[int]) -> Action:
        """The action in a turn."""
        return self.spoken.parse(self._decode(token_ids))

    def _without_end(self, completion: Completion) -> Completion:
        """The completion less the special tokens at its end: the same message goes on with the feedback."""
        kept = len(completion.token_ids)
        while kept and completion.token_ids[kept - 1] in self.special_ids:
            kept -= 1
        return replace(completion, token_ids=completion.token_ids[:kept], logprobs=completion.logprobs[:kept])

    def _decode(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=False))


def _well_formed(ledger: Ledger, protocol: Protocol) -> bool:
    return all(
        protocol.is_well_formed(turn.text, before.text)
        for before, turn in pairwise(ledger.segments)
        if turn.kind is SegmentKind.POLICY
    )
