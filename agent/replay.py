"""Counterfactuals of a trajectory: the same up to a search, whose query another retriever answers.

The prefix is the token ids that are on record; nothing that the policy wrote is encoded again.
"""

from __future__ import annotations

from agent.engines.base import Completion, FinishReason
from agent.evaluation.samples import sampled
from agent.rollout import Agent, Episode
from agent.tools import SEARCH, Call
from agent.trajectory import Ledger, SegmentKind, StopReason, Trajectory
from data.errors import ConfigError, RetrieverError
from data.records import Question


async def replay(
    agent: Agent, trajectory: Trajectory, turn: int, samples: int = 1, seed: int = 0
) -> list[Trajectory]:
    """Return trajectories that begin like this one up to the query of a turn, which agent.searcher answers.

    turn: from 0, as in its searches. What follows is the policy's, sampled as the agent samples; its later
    searches are agent.searcher's, too. Raises ConfigError where the turn is none that searched, or the
    agent's protocol reads another query there; RetrieverError where that search fails.
    """
    ledger = until(trajectory, turn, observed=False)
    written = ledger.segments[-1]
    episode = Episode(agent, trajectory.question, ledger)  # takes off a turn that nothing has answered yet
    action = agent.read_action(written.token_ids)
    asked = next(search.query for search in trajectory.searches if search.turn == turn)
    if not (isinstance(action, Call) and action.argument == asked):
        read = f"{agent.spoken.name} reads {action} in turn {turn}"
        raise ConfigError(f"protocol: {read}, on record is {asked!r}")
    told = list(written.logprobs or []), FinishReason.STOP, written.weights_version
    await episode.take(Completion(written.token_ids, *told))
    if episode.outcome is StopReason.SEARCH_FAILED:
        raise RetrieverError(str(ledger.searches[-1].error))
    if ledger.segments[-1].kind is SegmentKind.POLICY:
        raise ConfigError(f"turn = {turn}: no passage is read in it ({episode.outcome})")
    return await _go_on(agent, trajectory.question, ledger, samples, seed)


async def resample(
    agent: Agent, trajectory: Trajectory, turn: int, samples: int = 1, seed: int = 0
) -> list[Trajectory]:
    """Return continuations of what was found then: the same as `replay`, but for the passages of the turn."""
    ledger = until(trajectory, turn, observed=True)
    return await _go_on(agent, trajectory.question, ledger, samples, seed)


def until(trajectory: Trajectory, turn: int, observed: bool) -> Ledger:
    """The trajectory up to the end of a turn, with or without what it found; ConfigError as `replay`."""
    searched = [search.turn for search in trajectory.searches if search.tool == SEARCH.name]
    if turn not in searched:
        allowed = f"a turn that searched: {', '.join(map(str, searched))}" if searched else "none searched"
        raise ConfigError(f"turn = {turn}: {trajectory.question.id!r}: allowed: {allowed}")
    places = [at for at, s in enumerate(trajectory.segments) if s.kind is SegmentKind.POLICY]
    end = places[turn] + 1 + observed
    if end > len(trajectory.segments):
        raise ConfigError(f"turn = {turn}: no passage was read in it ({trajectory.stop_reason})")
    kept = [search for search in trajectory.searches if search.turn < turn + observed]
    return Ledger(trajectory.segments[:end], kept)


async def _go_on(
    agent: Agent, question: Question, ledger: Ledger, samples: int, seed: int
) -> list[Trajectory]:
    ledgers = [Ledger([*ledger.segments], [*ledger.searches]) for _ in range(samples)]
    return await agent.rollout(sampled([question], samples), seed, ledgers=ledgers)
