"""Training with pictures: the trainer reads the pixels that the sampler read, in whatever layout."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from agent.engines.base import Sampling
from agent.engines.hf import HFEngine
from agent.protocol import COMPACT
from agent.rollout import Agent
from data.errors import ConfigError, DataError
from data.jsonl import write_jsonl
from data.run_dir import read_metrics
from rl.config import RolloutConfig, TrainConfig
from rl.estimate import ResourceEstimate
from rl.learner.batch import micro_batches
from rl.learner.critic import Critic
from rl.learner.learner import Learner
from rl.learner.logprobs import Scorer
from rl.learner.workers import Workers
from scripts import __main__ as sleuth
from tests.fakes import question
from tests.rl.learner.test_logprobs import assert_same, gradients, weights_of
from tests.samples import quick
from tests.vision import PageSearcher, draw_pages, seeing_policy

LAYOUTS = pytest.mark.parametrize("packing", [True, False])
ROLLOUT = RolloutConfig()


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return seeing_policy(tmp_path_factory.mktemp("seeing"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return draw_pages(tmp_path_factory.mktemp("pages"))


class Searching(HFEngine):
    """Writes what it samples, and then always an action, so that pictures come."""

    async def generate(self, prompt_ids, sampling, trajectory_id, pictures=()):
        done = await super().generate(prompt_ids, sampling, trajectory_id, pictures)
        page = (len(prompt_ids) + len(pictures)) % 3
        end = "<answer>a</answer>" if len(pictures) > 1 else f"<search>word {page}</search>"
        ids = self.tokenizer.encode(end, add_special_tokens=False)
        return replace(done, token_ids=done.token_ids + ids, logprobs=done.logprobs + [None] * len(ids))


@pytest.fixture(scope="module")
def trajectories(policy, pages):
    engine = Searching(policy.model, policy.tokenizer, 3, vision=policy.vision)
    protocol = replace(COMPACT, max_response_tokens=6)
    agent = Agent(engine, policy.tokenizer, PageSearcher(pages, "x"), protocol, Sampling(), 9, policy.vision)
    asked = ("Who?", "What is this?", "And where is that other one, please?", "Why?")
    return asyncio.run(agent.rollout([question(text) for text in asked]))


def lay_out(trajectories, packing):
    (batch,) = micro_batches(trajectories, range(len(trajectories)), 100_000, packing)
    return batch


def plain(policy, batch, trajectories):
    """Log-probs by the model's own forward over ids and pixels, one trajectory at a time."""
    logprobs = []
    for row in batch.rows:
        trajectory = trajectories[row]
        seen = [policy.vision.see(picture.source).pixels for picture in trajectory.pictures]
        pixels = {name: torch.cat([one[name] for one in seen], dim=1) for name in seen[0]}
        ids = torch.tensor([trajectory.token_ids])
        distribution = torch.log_softmax(policy.model(input_ids=ids, **pixels).logits[0].float(), -1)
        trained = [t for t, kept in enumerate(trajectory.loss_mask) if kept]
        logprobs += [distribution[t - 1, trajectory.token_ids[t]] for t in trained]
    return torch.stack(logprobs)


@LAYOUTS
def test_log_probs_and_gradients_are_those_of_the_models_own_forward(policy, trajectories, packing):
    batch = lay_out(trajectories, packing)
    assert len(batch.pictures) == 2 * len(trajectories)
    expected = plain(policy, batch, trajectories)
    theirs = gradients(policy.model, (expected * weights_of(batch)).sum())
    taken = Scorer(policy.model, ROLLOUT, 7, policy.vision)(batch).logprobs
    torch.testing.assert_close(taken, expected, atol=2e-6, rtol=1e-6)
    ours = gradients(policy.model, (taken * weights_of(batch)).sum())
    assert any("vision_model" in name and grad.abs().max() > 0 for name, grad in ours.items())
    assert_same(ours, theirs)


@LAYOUTS
def test_sampler_and_trainer_agree_after_pictures(policy, trajectories, packing):
    batch = lay_out(trajectories, packing)
    taken = Scorer(policy.model, ROLLOUT, vision=policy.vision)(batch).logprobs
    sampled = batch.sampled  # the test wrote the actions itself
    assert sampled.sum() >= 4 * 3
    torch.testing.assert_close(taken[sampled], batch.sampler_logprobs[sampled], atol=1e-4, rtol=0)


def test_no_token_of_a_picture_is_trained(policy, trajectories):
    batch = lay_out(trajectories, True)
    is_image = batch.token_ids == policy.vision.image_token_id
    assert is_image.sum() == 16 * len(batch.pictures)
    assert not (is_image & batch.loss_mask).any()


def test_the_critic_sees_the_same_pictures_in_either_layout(policy, trajectories):
    critic = Critic.from_policy(policy.model, policy.vision)
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
    packed, padded = (lay_out(trajectories, packing) for packing in (True, False))
    torch.testing.assert_close(critic(packed), critic(padded), atol=1e-5, rtol=1e-5)


def test_a_picture_that_changed_its_shape_since_it_was_shown_is_named(policy, trajectories):
    batch = lay_out(trajectories, True)
    cut = replace(batch, pictures=[replace(batch.pictures[0], tokens=3)])
    with pytest.raises(DataError, match="png: changed since it was shown"):
        Scorer(policy.model, ROLLOUT, vision=policy.vision)(cut)
    with pytest.raises(ValueError, match="need the policy's vision"):
        Scorer(policy.model, ROLLOUT)(batch)


def test_weights_shared_out_are_refused_with_pictures(policy):
    config = TrainConfig(policy="p", questions="q", retriever="r", out="o", sharding="fsdp")
    with pytest.raises(ConfigError, match="sharding = 'fsdp': not with a policy that reads pictures"):
        Learner(policy, config, COMPACT, Workers(0, 2))


RECIPE = """
policy: {folder}/policy
questions: {folder}/questions.jsonl
retriever: {folder}/index
out: {folder}/run
protocol: {{name: compact, max_response_tokens: 6, max_turns: 2}}
rollout: {{questions_per_step: 2, group_size: 2}}
algorithm: {{learning_rate: 1.0e-3, entropy_coefficient: 0.01, kl_coefficient: 0.01}}
device: cpu
"""


def write_world(folder: Path) -> None:
    draw_pages(folder / "pages")
    pages = [{"id": f"p{n}", "title": "T", "text": f"word {n}", "image": f"pages/{n}.png"} for n in range(3)]
    write_jsonl(folder / "corpus.jsonl", pages)
    asked = [{"id": f"q{n}", "question": f"word {n}?", "golden_answers": ["A"]} for n in range(3)]
    write_jsonl(folder / "questions.jsonl", asked)
    index = ["index", "--corpus", str(folder / "corpus.jsonl"), "--out", str(folder / "index")]
    assert sleuth.main(index) == 0
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))


@pytest.mark.parametrize("options", quick([[]], [[], ["--preset=ppo"], ["--lora.rank=4"]]))
def test_a_policy_with_eyes_is_trained_by_the_same_command(tmp_path, monkeypatch, options):
    policy = seeing_policy(tmp_path / "policy")
    policy.save(tmp_path / "policy", "compact")
    write_world(tmp_path)
    monkeypatch.setattr("agent.engines.hf.HFEngine", Searching)
    entropy = "--algorithm.entropy_coefficient=0.01"  # a gradient, whatever the rewards
    command = ["train", "--config", str(tmp_path / "recipe.yaml"), *options, entropy]
    assert sleuth.main([*command, "--steps", "1"]) == 0
    assert sleuth.main([*command, "--steps", "2", "--resume", "true"]) == 0
    rows = read_metrics(tmp_path / "run")
    assert [row["rollout/pictures"] for row in rows] == [2, 2]
    assert all(row["policy/grad_norm"] > 0 for row in rows)
    last = tmp_path / "run" / "checkpoints" / "step-000002"
    after = AutoModelForImageTextToText.from_pretrained(last).state_dict()
    before = policy.model.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("vision_model" in name for name in changed) and any("text_model" in name for name in changed)
    assert (last / "processor_config.json").exists()


def test_a_dry_run_counts_a_policy_with_eyes(tmp_path):
    policy = seeing_policy(tmp_path)
    config = TrainConfig(policy=str(tmp_path), questions="q", retriever="r", out="o", device="cpu")
    needs = ResourceEstimate(config)
    assert needs.whole == policy.model.num_parameters()
    assert needs.activation_bytes() > 0
