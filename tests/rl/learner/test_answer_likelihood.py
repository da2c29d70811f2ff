"""The learner's part in the credit by the gold answer's likelihood: who is asked, and about what."""

from types import SimpleNamespace

import pytest
import torch

from agent.trajectory import SegmentKind
from data.settings import LoraConfig
from rl.algorithm.credit import TrainingBatch
from rl.config import AlgorithmConfig
from tests.rl.learner.learning import (
    VOCABULARY,
    configure,
    learn,
    make_groups,
    make_learner,
    small_model,
)


def encode(text, add_special_tokens=True):
    assert not add_special_tokens
    return [ord(character) % VOCABULARY for character in text]


def plain(model, trajectory):
    """The mean log-prob of the gold answer before each turn, one forward pass each."""
    found, context, answer = [], [], encode(" Paris", False)
    for segment in trajectory.segments:
        if segment.kind is SegmentKind.POLICY:
            before = context + encode("<think> </think><answer>", False)
            logits = model(torch.tensor([before + answer])).logits[0, len(before) - 1 : -1].log_softmax(-1)
            found.append(logits.gather(1, torch.tensor(answer)[:, None]).mean().item())
        context = context + segment.token_ids
    return found


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("masked", [True, False])
def test_the_likelihoods_are_those_of_the_starting_policy_before_and_after_updates(adapters, masked):
    algorithm = AlgorithmConfig(advantage="answer_likelihood", max_grad_norm=1e9)
    config = configure(algorithm, lora=LoraConfig(rank=2 if adapters else 0), mask_observations=masked)
    tokenizer = SimpleNamespace(encode=encode, decode=lambda ids, **_: "")
    learner, groups = make_learner(config, tokenizer=tokenizer), make_groups(0)
    reference = small_model(seed=0 if adapters else 1)
    for _ in range(2):
        batch = TrainingBatch([t for group in groups for t in group.trajectories], [], learner.model.device)
        learner._score(batch)
        assert batch.columns.keys() == {"answer"}  # no KL is asked for
        for trajectory, found in zip(batch.trajectories, batch.columns["answer"], strict=True):
            assert found.tolist() == pytest.approx(plain(reference, trajectory), abs=1e-4)
        learned = learn(learner, groups)
        assert learned.metrics["policy/answer_likelihood"] > 0
        assert any(gradient.any() for gradient in learned.policy[0].gradients.values())
