"""Every limit of a rollout, to the token; the trajectories alive at once, and their seeds."""

import asyncio
from dataclasses import replace

import pytest

from agent.engines.base import FinishReason, Sampling
from agent.engines.hf import HFEngine
from agent.environment import MIN_OBSERVATION_TOKENS
from agent.evaluation.evaluate import roll_out_each
from agent.protocol import COMPACT, Answer
from agent.rollout import Agent
from agent.tools import Search
from agent.trajectory import StopReason
from data.errors import EngineError
from tests.fakes import DictSearcher, byte_tokenizer, question, tiny_model
from tests.samples import quick
from tests.scripted import ScriptedEngine

TOKENIZER = byte_tokenizer()
PASSAGE = {"T": "fox" + "x" * 200}
SEARCH = COMPACT.render_turn("t", Search("fox"))
PROTOCOL = replace(COMPACT, max_turns=3, max_response_tokens=100, max_observation_tokens=90)
PROMPT_TOKENS = len(PROTOCOL.prompt(question().text))


def run(protocol, script, questions=None, **agent):
    engine = ScriptedEngine(TOKENIZER, script)
    made = Agent(engine, TOKENIZER, DictSearcher(PASSAGE), protocol, **agent)
    return asyncio.run(made.rollout(questions or [question()])), engine


def expected(protocol, turn_tokens):
    """Tokens of each segment and the reason to stop, by the limits alone; passages are longer."""
    lengths = [PROMPT_TOKENS]
    for turn in range(protocol.max_turns + 1):
        if sum(lengths) > protocol.max_context_tokens:
            return lengths, StopReason.TOKEN_LIMIT
        lengths.append(turn_tokens)
        if turn == protocol.max_turns:
            return lengths, StopReason.TURN_LIMIT
        room = protocol.max_context_tokens - sum(lengths)
        if room < MIN_OBSERVATION_TOKENS:
            return lengths, StopReason.TOKEN_LIMIT
        lengths.append(min(room, protocol.max_observation_tokens))
    raise AssertionError


@pytest.mark.parametrize("stride", quick([5], [5, 1]))
def test_a_trajectory_is_as_long_as_its_limits_allow_to_the_token(stride):
    """For contexts from one that has no room for the question to one that has room for all."""
    stops = set()
    for context in range(PROMPT_TOKENS - 2, PROMPT_TOKENS + 4 * len(SEARCH) + 3 * 90 + 3, stride):
        protocol = replace(PROTOCOL, max_context_tokens=context)
        (trajectory,), _ = run(protocol, [SEARCH])
        lengths = [len(segment.token_ids) for segment in trajectory.segments]
        assert (lengths, trajectory.stop_reason) == expected(protocol, len(SEARCH)), context
        stops.add((len(lengths), trajectory.stop_reason))
    assert stops == {(n, StopReason.TOKEN_LIMIT) for n in (1, 2, 4, 6)} | {(8, StopReason.TURN_LIMIT)}


def test_a_turn_that_is_no_action_counts_as_a_turn_and_needs_no_room_for_its_feedback():
    turns = ["a", "b", COMPACT.render_turn("t", Answer("x"))]
    for last, reason in ((1, StopReason.TURN_LIMIT), (2, StopReason.ANSWERED)):
        (trajectory,), _ = run(replace(PROTOCOL, max_turns=last), turns)
        assert (trajectory.stop_reason, trajectory.invalid_actions) == (reason, last)
    full = PROMPT_TOKENS + 1
    (trajectory,), _ = run(replace(PROTOCOL, max_context_tokens=full), turns)
    assert [s.text for s in trajectory.segments[1:]] == ["a", PROTOCOL.invalid]
    assert trajectory.stop_reason is StopReason.TOKEN_LIMIT


@pytest.mark.parametrize("most", [1, 7, 40])
def test_a_turn_has_no_more_tokens_than_it_may(most):
    (trajectory,), _ = run(replace(PROTOCOL, max_turns=0, max_response_tokens=most), ["x" * 30])
    assert trajectory.segments[1].text == "x" * min(most, 30)


class Counting(ScriptedEngine):
    """Count the trajectories that are alive, from their first turn to their release."""

    alive, most, seeds = frozenset(), 0, ()

    async def generate(self, prompt_ids, sampling, trajectory_id, pictures=()):
        self.alive |= {trajectory_id}
        self.most = max(self.most, len(self.alive))
        self.seeds = (*self.seeds, (trajectory_id.split("/")[0], sampling.seed))
        await asyncio.sleep(0)
        return await super().generate(prompt_ids, sampling, trajectory_id)

    async def release(self, trajectory_id):
        self.alive -= {trajectory_id}
        await super().release(trajectory_id)


QUESTIONS = [question(f"{n}?") for n in range(9)]
TWO_TURNS = [SEARCH, COMPACT.render_turn("t", Answer("x"))]


@pytest.mark.parametrize("most", [1, 4, 20])
def test_no_more_trajectories_are_alive_than_may_be(most):
    engine = Counting(TOKENIZER, TWO_TURNS)
    agent = Agent(engine, TOKENIZER, DictSearcher(PASSAGE), PROTOCOL, max_live=most)
    found = asyncio.run(agent.rollout(QUESTIONS))
    assert engine.most == min(most, 9) and len(engine.released) == 9
    assert [t.question for t in found] == QUESTIONS


def test_every_turn_of_every_trajectory_has_a_seed_of_its_own_that_follows_from_the_first():
    def seeds(seed, each=False, questions=QUESTIONS):
        engine = Counting(TOKENIZER, TWO_TURNS)
        agent = Agent(engine, TOKENIZER, DictSearcher(PASSAGE), PROTOCOL)
        work = (
            roll_out_each(agent, questions, seed, lambda _: None) if each else agent.rollout(questions, seed)
        )
        asyncio.run(work)
        return sorted(engine.seeds)

    for each in (False, True):
        assert seeds(1, each) == seeds(1, each)
        assert len({*seeds(1, each), *seeds(2, each)}) == 2 * 2 * 9
    assert len({seed for _, seed in seeds(1, questions=QUESTIONS[:1] * 3)}) == 6
    assert all(0 <= seed < 2**63 for _, seed in seeds(1))


@pytest.mark.parametrize("context", [4, 5, 16])
def test_a_completion_ends_where_the_models_positions_do(context):
    model = tiny_model("qwen2", len(TOKENIZER), max_position_embeddings=context)

    async def generate(count, most=50):
        engine = HFEngine(model, TOKENIZER)
        return await engine.generate(list(range(1, count + 1)), Sampling(max_tokens=most, seed=1), "t")

    for count in range(1, context + 2):
        done = asyncio.run(generate(count))
        assert len(done.token_ids) == len(done.logprobs) == max(0, context - count)
        assert done.finish_reason is FinishReason.LENGTH
    assert len(asyncio.run(generate(1, 2)).token_ids) == 2


def test_an_empty_prompt_is_refused():
    engine = HFEngine(tiny_model("qwen2", len(TOKENIZER)), TOKENIZER)
    with pytest.raises(EngineError, match=r"^t: an empty prompt cannot be continued$"):
        asyncio.run(engine.generate([], Sampling(), "t"))
