"""The outcome of a batch in the learner: the gradients and settings that AdamW is given, and metrics."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from agent.policy import Policy
from agent.protocol import COMPACT
from agent.trajectory import Segment, SegmentKind, StopReason, Trajectory
from rl.algorithm.rewards import Reward
from rl.config import AlgorithmConfig, RolloutConfig, TrainConfig
from rl.learner.learner import Learner
from rl.learner.workers import Workers, averages
from rl.rollouts import Collected, Group
from tests.fakes import question, tiny_model
from tests.rl.learner.plain import Gradients, PlainLearner

VOCABULARY = 64
RATE = 0.1
"""Learning rate of the gradient descent."""
GROUPS, SIZE = 4, 3


def small_model(kind: str = "qwen2", seed: int = 0) -> Any:
    """A random model of one layer, but for one that has layers of two kinds."""
    return tiny_model(kind, VOCABULARY, seed, **({} if kind == "gemma3" else {"num_hidden_layers": 1}))


_POLICY: Any = small_model()
PROTOCOL = replace(COMPACT, max_turns=2, max_response_tokens=6)
TOKEN_LIMIT = 18
"""Tokens that the policy may write in a trajectory: two searches and an answer, six tokens each."""


def configure(
    algorithm: AlgorithmConfig | None = None, rollout: dict[str, Any] | None = None, **changes: Any
):
    """A configuration of these groups whose gradients are not clipped."""
    sizes: dict[str, Any] = {"questions_per_step": GROUPS, "group_size": SIZE}
    return TrainConfig(
        policy="p",
        questions="q",
        retriever="r",
        out="o",
        algorithm=algorithm or AlgorithmConfig(max_grad_norm=1e9),
        rollout=RolloutConfig(**sizes | (rollout or {})),
        **changes,
    )


@cache
def make_groups(seed: int) -> Sequence[Group]:
    """Four groups of three: one to three turns with observations between them, rewards on any of them.

    One trajectory wrote nothing, and one group is flat.
    """
    draw = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(VOCABULARY) for _ in range(count)]

    def member(number: int, at: int, prompt: list[int]) -> tuple[Trajectory, Reward]:
        segments, rewards = [Segment(SegmentKind.PROMPT, prompt, "")], []
        turns = 0 if (number, at) == (1, 2) else draw.randint(1, 3)
        for turn in range(turns):
            written = tokens(draw.randint(1, 6))
            segments.append(Segment(SegmentKind.POLICY, written, ""))
            if turn < turns - 1:
                segments.append(Segment(SegmentKind.OBSERVATION, tokens(draw.randint(1, 9)), ""))
            rewards.append(draw.choice([0.0, 0.1, 0.3]) + draw.choice([0.0, 1.0]) * (turn == turns - 1))
        if number == 2:
            rewards = [*[0.0] * (turns - 1), 0.5]
        sampled = [_sampled(segment, segments, draw) for segment in segments]
        ended = StopReason.TURN_LIMIT if turns == 3 else StopReason.ANSWERED
        return Trajectory(question(), sampled, ended, "a"), Reward(rewards, {})

    groups = []
    for number in range(GROUPS):
        prompt = tokens(draw.randint(2, 6))
        trajectories, rewards = zip(*(member(number, at, prompt) for at in range(SIZE)), strict=True)
        groups.append(Group(number, list(trajectories), list(rewards)))
    return tuple(groups)


def _sampled(segment: Segment, segments: list[Segment], draw: random.Random) -> Segment:
    """The segment as written by a sampler whose log-probs are nearly the policy's; some tokens were given."""
    if segment.kind is not SegmentKind.POLICY:
        return segment
    before = [token for each in segments[: segments.index(segment)] for token in each.token_ids]
    ids = torch.tensor([before + segment.token_ids])
    with torch.no_grad():
        distribution = _POLICY(ids).logits[0, len(before) - 1 : -1].log_softmax(-1)
    taken = distribution.gather(1, ids[0, len(before) :, None])[:, 0].tolist()
    noisy = [min(value + draw.gauss(0, 0.5), 0.0) for value in taken]
    return replace(segment, logprobs=[None if draw.random() < 0.05 else value for value in noisy])


@dataclass
class Given:
    """The arguments of one call of AdamW."""

    gradients: Gradients
    settings: dict[str, Any]


@contextmanager
def given_to_adamw(*modules: nn.Module | None) -> Iterator[list[list[Given]]]:
    """The calls for each module, inside."""
    calls: list[list[Given]] = [[] for _ in modules]
    names = [{id(p): n for n, p in module.named_parameters()} if module else {} for module in modules]

    @torch.no_grad()
    def step(optimizer: torch.optim.AdamW, closure: None = None) -> None:
        (group,) = optimizer.param_groups
        of = next(at for at, known in enumerate(names) if id(group["params"][0]) in known)
        gradients = {
            names[of][id(p)]: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for p in group["params"]
        }
        calls[of].append(Given(gradients, {k: group[k] for k in ("lr", "weight_decay", "betas")}))
        for parameter in group["params"]:
            parameter -= RATE * gradients[names[of][id(parameter)]]

    with patch.object(torch.optim.AdamW, "step", step):
        yield calls


@dataclass
class Learned:
    """The outcome of one step."""

    policy: list[Given]
    critic: list[Given]
    metrics: dict[str, float]


def make_learner(
    config: TrainConfig, kind: str = "qwen2", reference: Any = None, tokenizer: Any = None
) -> Learner:
    """A learner of a tiny policy, with a reference that differs, adapters and a critic that say something."""
    model, near = small_model(kind), None
    if config.algorithm.needs_reference and not config.lora.rank:
        near = Policy(reference or small_model(kind, 1), tokenizer)
    learner = Learner(Policy(model, tokenizer), config, PROTOCOL, Workers(), near)
    draw = torch.Generator().manual_seed(9)
    for name, parameter in learner.model.named_parameters():
        if "lora_B" in name:  # which are zero at first, as the critic's head is
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)
    if learner.critic:
        head = learner.critic.head.weight
        head.data = 0.03 * torch.randn(head.shape, generator=draw)
    return learner


def learn(learner: Learner, groups: Sequence[Group], step: int = 0) -> Learned:
    """One step of this process alone."""
    with given_to_adamw(learner.model, learner.critic) as (policy, critic):
        measured = learner.learn(Collected(list(groups), len(groups), len(groups), {}), step)
    metrics = {name: value for name, value in averages(measured).items() if not name.startswith("time/")}
    return Learned(policy, critic, metrics)


def plain_learner(learner: Learner, kind: str = "qwen2") -> PlainLearner:
    """The loops that should come to the same, from the learner's weights of now."""
    config, reference = learner.config, None
    if config.algorithm.kl_coefficient:
        reference = small_model(kind, 0 if config.lora.rank else 1)
    return PlainLearner(learner.model, reference, learner.critic, config, TOKEN_LIMIT, RATE)


def largest_difference(ours: Sequence[Given], theirs: Sequence[Gradients]) -> float:
    """Return the largest difference of any entry of any gradient, over the largest entry of all."""
    assert len(ours) == len(theirs)
    pairs = [(o.gradients[n], g) for o, t in zip(ours, theirs, strict=True) for n, g in t.items()]
    largest = max((float(g.abs().max()) for _, g in pairs), default=1.0)
    return max((float((o - g).abs().max()) for o, g in pairs), default=0.0) / largest
