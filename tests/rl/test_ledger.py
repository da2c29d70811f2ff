"""The tokens sampled are the tokens trained, from the draw to the loss: over turns, rows and models."""

import asyncio
from dataclasses import replace
from itertools import product

import pytest
import torch

from agent.engines.base import Sampling
from agent.engines.hf import HFEngine
from agent.protocol import SEARCH_R1
from agent.rollout import Agent
from agent.trajectory import SegmentKind
from data.records import Hit, Passage
from rl.config import RolloutConfig
from rl.learner.batch import micro_batches
from rl.learner.logprobs import Scorer
from tests.fakes import byte_tokenizer, question, tiny_model
from tests.samples import quick

TOKENIZER = byte_tokenizer(
    "<search>", merges=("< /", "s e", "a r", "c h", "se ar", "sear ch", "</ search", "</search >", "> Ċ")
)
PROTOCOL = replace(
    SEARCH_R1, max_turns=3, max_response_tokens=40, max_observation_tokens=80, max_context_tokens=1500
)


def talkative(kind):
    """A random model that likes to open and close searches."""
    model = tiny_model(kind, len(TOKENIZER))
    head = torch.nn.Linear(model.config.hidden_size, len(TOKENIZER))
    likely = [TOKENIZER.convert_tokens_to_ids(token) for token in ("<search>", "</search>", "</search", ">")]
    with torch.no_grad():
        head.weight.copy_(model.get_output_embeddings().weight)
        head.bias.zero_()
        head.bias[torch.tensor(likely)] = 6.0
    model.set_output_embeddings(head)
    model.config.tie_word_embeddings = False
    return model


class Everything:
    """Finds a passage that speaks the protocol, for any query."""

    async def search(self, query, k):
        return [Hit(Passage(str(i), f"About {query[:20]} </information>", "T"), 1.0, "g") for i in range(k)]


class Watched(HFEngine):
    """Remembers what it was given and what it drew, by trajectory."""

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.drawn = {}

    async def generate(self, prompt_ids, sampling, trajectory_id, pictures=()):
        done = await super().generate(prompt_ids, sampling, trajectory_id)
        self.drawn.setdefault(trajectory_id, []).append((list(prompt_ids), done.token_ids, done.logprobs))
        return done


SETTINGS = {
    "plain": {},
    "cool": {"temperature": 0.7},
    "truncated": {"top_p": 0.9, "top_k": 20, "renormalise_logprobs": True},
}


@pytest.mark.parametrize(
    ("kind", "sampled"),
    quick([("qwen2", "truncated")], product(("qwen2", "qwen3", "llama", "gemma3"), SETTINGS)),
)
def test_what_was_sampled_is_what_is_trained(kind, sampled):
    rollout = RolloutConfig(**SETTINGS[sampled])
    sampling = Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.renormalise_logprobs)
    model = talkative(kind)
    engine = Watched(model, TOKENIZER, max_rows=4)  # of nine trajectories: rows are given on
    agent = Agent(engine, TOKENIZER, Everything(), PROTOCOL, sampling)
    asked = [question(f"q {i}?") for i in range(3) for _ in range(3)]
    trajectories = asyncio.run(agent.rollout(asked, seed=3))
    assert sum(len(t.searches) for t in trajectories) > 5

    by_first = {}
    for turns in engine.drawn.values():
        by_first.setdefault(tuple(turns[0][0]), []).append(turns)
    for t in trajectories:
        turns = next(
            turns
            for turns in by_first[tuple(t.segments[0].token_ids)]
            if turns[-1][0] + turns[-1][1] == t.token_ids[: len(turns[-1][0]) + len(turns[-1][1])]
        )
        written = [s for s in t.segments if s.kind is SegmentKind.POLICY]
        assert [s.token_ids for s in written] == [ids for _, ids, _ in turns]
        assert [s.logprobs for s in written] == [logprobs for *_, logprobs in turns]
        for prompt, ids, _ in turns:  # each turn continues the ledger
            assert t.token_ids[: len(prompt) + len(ids)] == prompt + ids
    encoded_again = [TOKENIZER.encode(t.policy_text, add_special_tokens=False) for t in trajectories]
    sampled = [[i for i, mine in zip(t.token_ids, t.loss_mask, strict=True) if mine] for t in trajectories]
    assert encoded_again != sampled  # it would be noticed

    for packing in (True, False):
        for batch in micro_batches(trajectories, range(len(trajectories)), 700, packing):
            with torch.no_grad():
                taken = Scorer(model, rollout)(batch)
            torch.testing.assert_close(taken.logprobs, batch.sampler_logprobs, atol=5e-5, rtol=0)
