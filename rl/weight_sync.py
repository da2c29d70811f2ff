"""Hand new weights to the engine after every step, and check that they arrived.

An engine in a process of its own then completes a few prompts, and its log-probs of what it wrote must be
the trainer's: one layer left behind would otherwise train on quietly, off-policy.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from agent.engines.base import Completion, Engine, Sampling
from agent.prompt import encode_prompt
from agent.trajectory import Segment, SegmentKind, StopReason, Trajectory
from data.errors import EngineError
from data.records import Question
from rl.config import RolloutConfig
from rl.learner.batch import micro_batches
from rl.learner.logprobs import Scorer
from rl.learner.workers import Workers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from agent.engines.config import EngineConfig
    from agent.rollout import Agent
    from rl.learner.learner import Learner

logger = logging.getLogger(__name__)

PROBE_TOKENS = 16
"""Written to each prompt of a probe."""
PROBE_QUESTIONS = ("Who wrote Hamlet?", "What is the capital of Chad?", "Which metal is liquid?", "Why?")
FLOAT32_DIFFERENCE, HALF_DIFFERENCE = 1e-3, 0.05
"""Allowed unless the configuration says otherwise: rounding in half precision moves log-probs by 0.01."""

Completions = Mapping[str, Sequence[Completion]]
"""Completions of the same prompts by each server, by its name."""


class WeightSync:
    """Hands a learner's weights to its engine; the processes of a run do so together."""

    def __init__(
        self,
        engine: Engine,
        learner: Learner,
        config: EngineConfig,
        workers: Workers,
        prompts: Sequence[list[int]],
        sampling: Sampling,
    ) -> None:
        """prompts, sampling: of the probe."""
        self.engine, self.learner, self.config, self.workers = engine, learner, config, workers
        self.prompts = list(prompts)
        self.sampling = replace(sampling, max_tokens=PROBE_TOKENS, stop=(), seed=0)

    async def update(self, version: int) -> dict[str, float]:
        """Let the engine sample with the learner's weights; metrics of the probe, where there was one.

        Raises EngineError, in all processes, where the engine cannot load them or does not then agree.
        """
        if self.engine.shares_model:
            # Sharded, the model that is trained is another than the engine's.
            state = self.learner.weights_for_engine() if self.learner.sharded else None
            await self.engine.update_weights(state, version)
            return {}
        state = self.learner.weights_for_engine()
        completions, failure = {}, None
        if self.workers.leads:
            try:
                await self.engine.update_weights(state, version)
                completions = await self.engine.probe(self.prompts, self.sampling)
            except EngineError as error:
                failure = str(error)
        else:
            self.engine.weights_version = version
        completions, failure = self.workers.gather((completions, failure))[0]
        if failure is not None:
            raise EngineError(failure)
        when = f"after step {version}"
        return compare(completions, self.prompts, self.learner.scorer, self.config, self.learner.half, when)


def probe_prompts(agent: Agent) -> list[list[int]]:
    """A few questions as the policy is asked them, in token ids."""
    prompts = [agent.protocol.prompt(text) for text in PROBE_QUESTIONS]
    return [encode_prompt(prompt, agent.protocol, agent.tokenizer, agent.frame)[1] for prompt in prompts]


async def check_engine(agent: Agent, model: PreTrainedModel, config: EngineConfig) -> dict[str, float]:
    """Probe an engine that should have the model's weights; metrics, or EngineError where it has not."""
    prompts = probe_prompts(agent)
    completions = await agent.engine.probe(prompts, Sampling(max_tokens=PROBE_TOKENS, seed=0))
    half = model.dtype != torch.float32
    return compare(completions, prompts, Scorer(model, RolloutConfig()), config, half, "at the start")


@torch.no_grad()
def compare(
    completions: Completions,
    prompts: Sequence[list[int]],
    scorer: Scorer,
    config: EngineConfig,
    half: bool,
    when: str,
) -> dict[str, float]:
    """Mean and largest difference of the servers' log-probs from the scorer's, in nats, over all tokens.

    half: whether either computes in half precision. Raises EngineError, with its numbers, for a server whose
    mean is above `engine.max_probe_difference`.
    """
    if not completions:
        return {}
    limit = config.max_probe_difference or (HALF_DIFFERENCE if half else FLOAT32_DIFFERENCE)
    means, largest = [], 0.0
    for url, completed in completions.items():
        trajectories = [_trajectory(p, c) for p, c in zip(prompts, completed, strict=True) if c.token_ids]
        taken = [
            (scorer(each).logprobs.float().cpu() - each.sampler_logprobs).abs()
            for each in micro_batches(trajectories, range(len(trajectories)), 8192, packing=False)
        ]
        differences = torch.cat(taken)
        mean, most = float(differences.mean()), float(differences.max())
        if not mean <= limit:  # NaN is no agreement
            raise EngineError(
                f"engine {config.label}: {url} does not have the policy's weights {when}: log-probs of "
                f"{len(differences)} probed tokens differ by {mean:.2g} nats on average, {most:.2g} at most "
                f"(allowed on average: {limit:g}, engine.max_probe_difference)"
            )
        means.append(mean)
        largest = max(largest, most)
    return {"sync/probe_difference": max(means), "sync/probe_largest_difference": largest}


def _trajectory(prompt: list[int], completion: Completion) -> Trajectory:
    segments = [
        Segment(SegmentKind.PROMPT, prompt, ""),
        Segment(SegmentKind.POLICY, completion.token_ids, "", completion.logprobs),
    ]
    return Trajectory(Question("probe", "", ()), segments, StopReason.TOKEN_LIMIT)
