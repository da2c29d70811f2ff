"""The sides of `scripts.bench.rollout --passages`: our engines and TRL's `GRPOTrainer` over real passages.

hf      the hf engine under `Agent.rollout`
vllm    the vLLM engine under the same, its server on the same cores
trl     `GRPOTrainer._generate` of TRL 1.16 with a search tool: transformers' `generate`, all live rows in
        lockstep, the whole text read again each turn; its tools called one after the other

An untrained policy does not search by itself. So the lengths of its turns and its queries are laid down,
the same for all sides: 1 to 4 searches and an answer, 20 to 160 tokens a turn, as policies that think write
them. What it writes is sampled freely at temperature 1, and the end of sequence has no chance before the
turn's last token; then the action follows as given text. Queries are questions of the collection. A search
is BM25 in this process, 3 passages and at most 500 tokens. TRL's prompts have the tool's schema where ours
have the instruction, and its template closes a turn; so its tokens differ by some.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from agent.engines.base import Completion, Engine, Sampling
from agent.engines.config import EngineConfig
from agent.engines.hf import HFEngine
from agent.engines.open_vllm import open_vllm
from agent.engines.vllm import VLLMEngine
from agent.policy import Policy
from agent.protocol import SEARCH_R1, Protocol
from agent.rollout import Agent
from agent.trajectory import SegmentKind, Trajectory
from data.corpus import Corpus
from data.errors import ConfigError
from data.questions import load_questions
from data.records import Question
from retriever_server.client.search_client import SearchClient
from retriever_server.indexes.bm25 import BM25Index
from retriever_server.retriever import Retriever

SHORTEST, LONGEST = 20, 160


class Turn(NamedTuple):
    """The course of a policy's turn: so many tokens, then a search, or an answer where it has no query."""

    tokens: int
    query: str | None


@dataclass(frozen=True)
class Planned(Protocol):
    """Acts as the last tags say: what was sampled before them may have some of its own."""

    def parse(self, turn: str) -> Any:
        """The action that was given."""
        return super().parse(turn[max(turn.rfind("<search>"), turn.rfind("<answer>")) :])


PROTOCOL = Planned(**vars(SEARCH_R1))
NEVER = tuple(f"{tag[:2]}never a {tag[2:]}" for tag in PROTOCOL.stop)
"""Stop strings as long as the real ones, to be looked for and not found."""


@dataclass(frozen=True)
class Work:
    """The input of all sides."""

    policy: Policy
    retriever: Retriever
    questions: list[Question]
    plans: dict[str, list[Turn]]
    """By the question's id."""


class Outcome(NamedTuple):
    """The outcome of a side."""

    seconds: float
    processor_seconds: float
    """CPU seconds of this process and those that it started: to compare where other work runs beside it."""
    sampled: int
    """Tokens."""
    read: int
    """Tokens of prompts and observations, each once."""
    searches: int


def make_work(policy: Policy, folder: Path, count: int, index_folder: Path) -> Work:
    """Questions of `folder`/dev.jsonl, their plans, and BM25 over `folder`/corpus.jsonl."""
    found = load_questions(str(folder / "dev.jsonl"))
    if len(found) < count:
        raise ConfigError(f"{folder}/dev.jsonl: {len(found)} questions; allowed: at least {count}")
    draw = random.Random(0)
    questions = draw.sample(found, count)
    plans = {}
    for number, question in enumerate(questions):
        queries = [question.text, *(draw.choice(found).text for _ in range(number % PROTOCOL.max_turns))]
        plans[question.id] = [Turn(draw.randint(SHORTEST, LONGEST), query) for query in [*queries, None]]
    retriever = BM25Index.build(Corpus(folder / "corpus.jsonl"), index_folder)
    return Work(policy, retriever, questions, plans)


# ---- our engines -----------------------------------------------------------------------------------


class Laid(Engine):
    """An engine whose completions are as long as planned, and end in the planned action."""

    def __init__(self, engine: Engine, work: Work) -> None:
        self.engine, self.plans, self.encode = engine, work.plans, work.policy.tokenizer.encode
        self.turns: dict[str, int] = {}

    async def generate(self, prompt_ids, sampling, trajectory_id, pictures=()) -> Completion:
        """So many tokens of the engine's own, then the tags."""
        number = self.turns[trajectory_id] = self.turns.get(trajectory_id, -1) + 1
        turn = self.plans[trajectory_id.rsplit("/", 2)[0]][number]
        sampling = replace(sampling, max_tokens=turn.tokens, stop=NEVER)
        done = await self.engine.generate(prompt_ids, sampling, trajectory_id)
        assert len(done.token_ids) == turn.tokens, "the lengths of the sides must agree"
        action = f"<answer>{'x'}</answer>" if turn.query is None else f"<search>{turn.query}</search>"
        given = self.encode(action, add_special_tokens=False)
        return replace(done, token_ids=done.token_ids + given, logprobs=done.logprobs + [None] * len(given))

    async def release(self, trajectory_id: str) -> None:
        """As the engine."""
        await self.engine.release(trajectory_id)

    async def update_weights(self, state, version) -> None:
        """As the engine."""
        await self.engine.update_weights(state, version)


async def roll_out(engine: Engine, work: Work, seed: int) -> Outcome:
    """Our agent over an engine of ours, all trajectories at once."""
    client = SearchClient(work.retriever)
    agent = Agent(Laid(engine, work), work.policy.tokenizer, client, PROTOCOL, max_live=len(work.questions))
    clock = Clock()
    done = await agent.rollout(work.questions, seed)
    return _count(done, work, clock)


class Clock:
    """Starts now."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), processor_seconds()

    def read(self) -> tuple[float, float]:
        """Seconds, and seconds of the processor, since."""
        return time.perf_counter() - self._wall, processor_seconds() - self._processor


def processor_seconds() -> float:
    """Return CPU seconds of this process and all below it that run (Linux; elsewhere of this one alone)."""
    spent, parents = {os.getpid(): time.process_time()}, dict[int, int]()
    tick = os.sysconf("SC_CLK_TCK")
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            number = int(path.parent.name)
            parents[number] = int(fields[1])
            spent.setdefault(number, (int(fields[11]) + int(fields[12])) / tick)
    ours = {os.getpid()}
    while found := {child for child, parent in parents.items() if parent in ours} - ours:
        ours |= found
    return sum(spent[number] for number in ours)


def _count(done: Sequence[Trajectory], work: Work, clock: Clock) -> Outcome:
    seconds = clock.read()
    turns = [turn for question in work.questions for turn in work.plans[question.id]]
    sampled = sum(turn.tokens for turn in turns)
    read = sum(len(t.token_ids) for t in done) - sampled
    searches = sum(len(t.searches) for t in done)
    planned = sum(turn.query is not None for turn in turns)
    assert searches == planned, f"{searches} searches, {planned} planned"
    assert all(s.kind != SegmentKind.POLICY or len(s.token_ids) >= SHORTEST for t in done for s in t.segments)
    return Outcome(*seconds, sampled, read, searches)


class EndlessHF(HFEngine):
    """The hf engine to which no token is an end."""

    def __init__(self, policy: Policy, max_rows: int) -> None:
        super().__init__(policy.model, policy.tokenizer, max_rows)
        self._eos = set()


def run_hf(work: Work, seed: int) -> Outcome:
    """The hf engine."""
    return asyncio.run(roll_out(EndlessHF(work.policy, len(work.questions)), work, seed))


class ServerSide:
    """The vLLM engine: one server for all runs."""

    def __init__(self, work: Work, config: EngineConfig, source: str, log_folder: Path) -> None:
        self.engine: VLLMEngine = open_vllm(
            config, work.policy, source, PROTOCOL, len(work.questions), log_folder
        )
        parameters = self.engine._parameters

        def endless(sampling: Sampling, room: int) -> dict[str, Any]:
            return parameters(sampling, room) | {"ignore_eos": True, "stop_token_ids": []}

        vars(self.engine)["_parameters"] = endless
        self.runner = asyncio.Runner()
        self.cached = ""

    def __call__(self, work: Work, seed: int) -> Outcome:
        """One rollout, from an empty prefix cache."""
        return self.runner.run(self._run(work, seed))

    async def _run(self, work: Work, seed: int) -> Outcome:
        await self.engine.start()
        (server,) = self.engine.pool.live
        await server.ask("/reset_prefix_cache")
        before = await self._counters()
        outcome = await roll_out(self.engine, work, seed)
        after = await self._counters()
        spent = {name: after[name] - before.get(name, 0) for name in after}
        self.cached = ", ".join(f"{name} {value:,.1f}" for name, value in spent.items())
        return outcome

    async def _counters(self) -> dict[str, float]:
        """Return what the server has counted so far."""
        (server,) = self.engine.pool.live
        assert server._http is not None
        text = (await server._http.get("/metrics")).text
        names = ("prompt_tokens_total", "prefix_cache_hits_total", "generation_tokens_total")
        names += ("request_prefill_time_seconds_sum", "request_decode_time_seconds_sum")
        names += ("request_queue_time_seconds_sum", "iteration_tokens_total_count")
        rows = (line.split(" ") for line in text.splitlines() if line.startswith("vllm:"))
        found = {row[0].split("{")[0][5:]: float(row[-1]) for row in rows}
        return {name.removesuffix("_total"): found[name] for name in names if name in found}

    def close(self) -> None:
        """End the server."""
        self.runner.run(self.engine.close())
        self.runner.close()
