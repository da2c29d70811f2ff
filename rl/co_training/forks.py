"""Scores by what would have happened: the policy goes on from a search that shows other passages.

fork         mean exact match of continuations with a passage, less that with the next one in its place
alone        exact match of a greedy continuation from the passage alone (Agentic-R, 2601.11888)
likelihood   log-prob of the gold answer right after the search with the passage, less with the next one
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from agent.environment import MIN_OBSERVATION_TOKENS
from agent.protocol import Answer
from agent.rollout import Agent
from agent.search_tool import observe
from agent.trajectory import Ledger, SearchRecord, Segment, SegmentKind
from data.errors import DataError
from data.metrics.answers import exact_match
from data.records import Hit
from rl.co_training.scores import Candidates, Scored

ROWS = 16


@dataclass(frozen=True)
class Forks:
    """Counterfactual scores by one agent. `model` is its policy, for likelihoods."""

    agent: Agent
    model: Any = None
    continuations: int = 4
    top: int = 5
    """Candidates that are tried, from the first on."""
    drawn: int = 2
    """Candidates drawn from the others."""
    seed: int = 0

    async def fork(self, batch: Sequence[Candidates]) -> list[Scored]:
        """Score by the difference that a passage makes to the answer."""
        tried = [self._tried(each) for each in batch]
        shown = [
            {arranged(candidates, id_, one) for id_ in ids for one in (True, False)}
            for candidates, ids in zip(batch, tried, strict=True)
        ]
        means, tokens = await self._continue(batch, shown, self.agent)
        return [_differences(*each) for each in zip(batch, tried, means, tokens, strict=True)]

    async def alone(self, batch: Sequence[Candidates]) -> list[Scored]:
        """Score every candidate by the answer that the agent comes to with it alone."""
        greedy = replace(self.agent, sampling=replace(self.agent.sampling, temperature=0.0))
        each_alone = [{(hit.passage.id,) for hit in c.hits} for c in batch]
        once = replace(self, continuations=1)
        means, tokens = await once._continue(batch, each_alone, greedy)
        return [
            Scored({id_: value for (id_,), value in found.items()}, spent)
            for found, spent in zip(means, tokens, strict=True)
        ]

    async def likelihood(self, batch: Sequence[Candidates]) -> list[Scored]:
        """Score by the log-prob of the first gold answer; nothing is sampled."""
        found = []
        for each in batch:
            tried, golds = self._tried(each), each.searches.question.gold_answers
            wanted = sorted({arranged(each, i, one) for i in tried for one in (True, False)})
            ledgers = {hits: self._ledger(each, hits, self.agent) for hits in wanted if golds}
            rows = {hits: self._with_answer(ledger, golds[0]) for hits, ledger in ledgers.items() if ledger}
            logprobs = dict(zip(rows, answer_logprobs(self.model, rows.values()), strict=True))
            found.append(_differences(each, tried, logprobs, sum(len(a) + len(b) for a, b in rows.values())))
        return found

    def _tried(self, candidates: Candidates) -> list[str]:
        ids = [hit.passage.id for hit in candidates.hits]
        rest = ids[self.top :]
        drawn = random.Random(f"{self.seed}/{candidates.searches.number}/{candidates.at}")
        return ids[: self.top] + drawn.sample(rest, min(self.drawn, len(rest)))

    def _ledger(self, candidates: Candidates, shown: Shown, agent: Agent) -> Ledger | None:
        searches, call = candidates.searches, candidates.call
        before = [
            SearchRecord(c.query, [Hit(p, 0.0, "") for p in c.passages], 0.0, turn=c.turn, tool=c.tool)
            for c in searches.calls[: candidates.at]
        ]
        hits = [hit for hit in candidates.hits if hit.passage.id in shown]
        return take_up(agent, searches.segments, before, call.query, call.turn, hits)

    async def _continue(
        self, batch: Sequence[Candidates], wanted: Sequence[Iterable[Shown]], agent: Agent
    ) -> tuple[list[dict[Shown, float]], list[int]]:
        """Mean exact match of the continuations from each observation of each search, and its tokens."""
        jobs = [
            (number, hits, ledger, (place * 100 + repeat) * 100 + each.at)
            for number, (each, all_shown) in enumerate(zip(batch, wanted, strict=True))
            for place, hits in enumerate(sorted(all_shown))
            for repeat in range(self.continuations)
            if (ledger := self._ledger(each, hits, agent)) is not None
        ]
        lengths = [len(ledger.token_ids) for _, _, ledger, _ in jobs]
        trajectories = await agent.rollout(
            [batch[number].searches.question for number, *_ in jobs],
            self.seed,
            ledgers=[ledger for _, _, ledger, _ in jobs],
            keys=[batch[number].searches.number * 10**7 + key for number, _, _, key in jobs],
        )
        means: list[dict[Shown, float]] = [{} for _ in batch]
        tokens = [0] * len(batch)
        for (number, hits, *_), length, trajectory in zip(jobs, lengths, trajectories, strict=True):
            asked = trajectory.question
            right = exact_match(trajectory.answer, asked.gold_answers, asked.normalizer)
            means[number][hits] = means[number].get(hits, 0.0) + right / self.continuations
            tokens[number] += len(trajectory.token_ids) - length
        return means, tokens

    def _with_answer(self, ledger: Ledger, gold: str) -> tuple[list[int], list[int]]:
        """The tokens up to the answer, after no thought, and those of the answer."""
        spoken, tokenizer = self.agent.spoken, self.agent.tokenizer
        turn = spoken.render_turn("", Answer(gold))
        if spoken.opens_thought(ledger.segments[-1].text):
            turn = turn.removeprefix(f"<{spoken.think_tag}>")
        tag = f"<{spoken.answer_tag}>"
        head, answer = turn[: turn.index(tag) + len(tag)], spoken.padding[0] + gold
        encode = tokenizer.encode
        return (
            ledger.token_ids + encode(head, add_special_tokens=False),
            encode(answer, add_special_tokens=False),
        )


Shown = tuple[str, ...]
"""The ids of the passages of one observation, as they are ranked."""


def arranged(candidates: Candidates, passage_id: str, with_it: bool) -> Shown:
    """The passages that the search would show with a candidate, or with the next one in its place.

    As many as it did show, the others as they were ranked.   shown a b of a b c: with c: a c; without a: b c
    """
    k = len(candidates.call.passages)
    ids = [hit.passage.id for hit in candidates.hits]
    others = [id_ for id_ in ids if id_ != passage_id]
    kept = {*others[: k - with_it], *([passage_id] if with_it else [])}
    return tuple(id_ for id_ in ids if id_ in kept)


def _differences(
    candidates: Candidates, tried: Iterable[str], values: dict[Shown, float], tokens: int
) -> Scored:
    pairs = {i: [values.get(arranged(candidates, i, one)) for one in (True, False)] for i in tried}
    return Scored({i: a - b for i, (a, b) in pairs.items() if a is not None and b is not None}, tokens)


@torch.no_grad()
def answer_logprobs(model: Any, rows: Iterable[tuple[list[int], list[int]]]) -> list[float]:
    """Sum the log-probs of the second tokens of each pair after the first."""
    given, found = list(rows), list[float]()
    for start in range(0, len(given), ROWS):
        part = given[start : start + ROWS]
        ids = [torch.tensor(context + answer, device=model.device) for context, answer in part]
        mask = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
        logits = model(input_ids=pad_sequence(ids, batch_first=True), attention_mask=mask).logits
        for row, each, (context, answer) in zip(logits, ids, part, strict=True):
            taken = row[len(context) - 1 : len(each) - 1].float().log_softmax(-1)
            chosen = taken.gather(1, each[len(context) :, None])
            found.append(float(chosen.sum()) if answer else 0.0)
    return found


def take_up(
    agent: Agent,
    segments: Sequence[Mapping[str, Any]],
    searches: Sequence[SearchRecord],
    query: str,
    turn: int,
    hits: list[Hit],
) -> Ledger | None:
    """Return the ledger up to policy turn `turn`, which asked `query`, and the observation of `hits`.

    `Agent.rollout` goes on from there. segments: as the file has them; in its compact form they are encoded
    again. searches: those before. None where the context has no room. Raises DataError for pictures, and
    where there is no such turn.
    """

    def encode(text: str) -> list[int]:
        return agent.tokenizer.encode(text, add_special_tokens=False)

    ledger = Ledger(searches=list(searches))
    for each in segments:
        if each.get("pictures"):
            raise DataError("a trajectory with pictures cannot be taken up again from its text")
        ids = list(each["token_ids"]) if "token_ids" in each else encode(each["text"])
        ledger.segments.append(Segment(SegmentKind(each["kind"]), ids, each["text"]))
        if ledger.turns == turn + 1:
            break
    else:
        raise DataError(f"a trajectory of {ledger.turns} turns has no turn {turn}")
    room = agent.spoken.max_context_tokens - len(ledger.token_ids)
    if room < MIN_OBSERVATION_TOKENS:
        return None
    budget = min(agent.spoken.max_observation_tokens, room)
    shown = observe(hits, [], agent.spoken, agent.sanitize, encode, budget, None)
    ledger.searches.append(SearchRecord(query, hits, 0.0, turn=turn))
    ledger.segments.append(Segment(SegmentKind.OBSERVATION, shown.token_ids, shown.text))
    return ledger
