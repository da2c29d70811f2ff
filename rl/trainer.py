"""GRPO over search trajectories (Shao et al. 2024, arXiv 2402.03300; Search-R1, arXiv 2503.09516).

A step: draw questions, let the agent answer each `group_size` times with live searches, reward the
answers, compare each with its group, update the policy on the tokens it wrote. On-policy unless
`updates_per_rollout` says otherwise. Departures from the papers: the loss is averaged over all
policy tokens of the batch; a group in which a search failed is left out of it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from agent.engines.base import Engine, Sampling
from agent.evaluate import evaluate
from agent.policy import Policy
from agent.rollout import Agent
from agent.trajectory import StopReason, Trajectory
from data.answers import exact_match
from data.checkpoint import best_checkpoint, latest_checkpoint, mark_best, save_checkpoint
from data.errors import RunStopped
from data.records import Question
from data.run_dir import RunDir, read_metrics
from rl.advantages import ADVANTAGES
from rl.config import TrainConfig
from rl.optimizer import Optimizer
from rl.rewards import combine
from rl.update import Updater

logger = logging.getLogger(__name__)

CONSOLE_KEYS = (
    "reward/mean",
    "rollout/searches",
    "rollout/valid_format",
    "policy/entropy",
    "policy/grad_norm",
    "time/step_seconds",
)
"""What the console line of a step shows of its metrics."""


class Trainer:
    """Trains one policy in one process. `run` is the whole of it."""

    def __init__(
        self,
        config: TrainConfig,
        policy: Policy,
        agent: Agent,
        questions: Sequence[Question],
        dev_questions: Sequence[Question],
        run: RunDir,
        reference: Policy | None = None,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.config, self.policy, self.run_dir = config, policy, run
        self.questions, self.dev_questions = questions, dev_questions
        self.agent = replace(agent, sampling=Sampling(temperature=config.rollout.temperature))
        self.engine: Engine = agent.engine
        self.reward = combine(config.rewards)
        self.optimizer = Optimizer(policy.model, config.algorithm)
        self.updater = Updater(policy.model, self.optimizer, config, reference.model if reference else None)
        self.checkpoints = Path(run.path) / "checkpoints"
        self.on_step = on_step
        self.step = 0

    async def run(self) -> None:
        """Train to the last step, resuming from the last checkpoint; state is saved however it ends."""
        await self._restore()
        try:
            if self._due(self.config.eval_every) and not self._evaluated():
                await self._evaluate()  # the last start was stopped in the middle of it
            while self.step < self.config.steps:
                await self._one_step()
                if self._due(self.config.eval_every):
                    await self._evaluate()
                elif self._due(self.config.save_every):
                    self._save()
                self.on_step(self.step)
        except (asyncio.CancelledError, RunStopped):
            self._save()
            raise
        if not self.config.eval_every:
            mark_best(self.checkpoints, self.step, score=0.0)

    async def _one_step(self) -> None:
        started = time.monotonic()
        trajectories = await self._rollout()
        rollout_seconds = time.monotonic() - started
        self._check_failures(trajectories)
        whole = _whole_groups(trajectories, self.config.rollout.group_size)
        metrics = self._learn(whole)
        self.step += 1
        await self.engine.update_weights(None, self.step)
        seconds = time.monotonic() - started
        tokens = sum(len(t.token_ids) for t in trajectories)
        self.run_dir.log(
            self.step,
            {
                **rollout_metrics(trajectories),
                **metrics,
                "time/rollout_seconds": rollout_seconds,
                "time/update_seconds": seconds - rollout_seconds,
                "time/step_seconds": seconds,
                "time/tokens_per_second": tokens / seconds,
                "time/trajectories_per_second": len(trajectories) / rollout_seconds,
            },
        )

    def _learn(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Reward whole groups and update the policy on them; where none is left, nothing changes."""
        if not trajectories:
            return {"rollout/groups": 0.0}
        group_size = self.config.rollout.group_size
        rewards = torch.tensor([self.reward(t) for t in trajectories])
        advantages = ADVANTAGES["grpo"](rewards, group_size, self.config.algorithm.scale_by_spread)
        with _recomputing(self.policy.model):
            updated = self.updater.update(trajectories, advantages)
        return {**reward_metrics(rewards, group_size), **updated}

    async def _rollout(self) -> list[Trajectory]:
        rollout = self.config.rollout
        drawn = draw_questions(self.questions, rollout.questions_per_step, self.step, self.config.seed)
        batch = [question for question in drawn for _ in range(rollout.group_size)]
        return await self.agent.rollout(batch, seed=self.config.seed * 1_000_003 + self.step)

    def _check_failures(self, trajectories: Sequence[Trajectory]) -> None:
        """Stop the run where too many searches of a batch failed; nothing of the batch is trained."""
        failed = [t for t in trajectories if t.stop_reason is StopReason.SEARCH_FAILED]
        if failed:
            reason = failed[0].searches[-1].error
            logger.warning("%d of %d trajectories lost to %s", len(failed), len(trajectories), reason)
        allowed = self.config.rollout.max_failed_share
        if len(failed) > allowed * len(trajectories):
            raise RunStopped(
                f"searches failed in {len(failed)} of {len(trajectories)} trajectories of step "
                f"{self.step + 1} (allowed: {allowed:.0%}; {reason}); the state of step {self.step} is "
                f"saved in {self.checkpoints}: start the same command again to go on"
            )

    async def _evaluate(self) -> None:
        """Greedy EM on the dev questions; the best so far keeps its checkpoint."""
        greedy = replace(self.agent, sampling=Sampling(temperature=0))

        async def rollout(questions, on_finished):
            await greedy.rollout(questions, on_finished=lambda _, trajectory: on_finished(trajectory))

        folder = self.run_dir.path / "evaluations" / f"dev-{self.step:06d}"
        settings = {"policy": f"step {self.step}", "protocol": self.agent.protocol.name}
        started = time.monotonic()
        scores = await evaluate(self.dev_questions, rollout, folder, settings)
        em = scores["em"]["mean"]
        self._save()
        best = best_checkpoint(self.checkpoints)
        if best is None or em > best[1]:
            mark_best(self.checkpoints, self.step, em)
        self.run_dir.log(  # last: it says that this evaluation is done
            self.step,
            {
                "dev/em": em,
                "dev/searches": scores["searches_per_question"],
                "time/evaluate_seconds": time.monotonic() - started,
            },
        )

    def _evaluated(self) -> bool:
        return any(row["step"] == self.step and "dev/em" in row for row in read_metrics(self.run_dir.path))

    def _due(self, every: int) -> bool:
        """Whether what is done every so many steps, and after the last, is due; 0 is never."""
        if not every or not self.step:
            return False
        return self.step == self.config.steps or self.step % every == 0

    def _save(self) -> None:
        def write(folder: Path) -> None:
            self.policy.save(folder, self.agent.protocol.name)
            self.optimizer.save(folder)

        save_checkpoint(self.checkpoints, self.step, write, self.config.keep_checkpoints)

    async def _restore(self) -> None:
        """Weights and optimiser of the last checkpoint. All else follows from the seed and the step."""
        found = latest_checkpoint(self.checkpoints)
        self.step = found.step if found else 0
        self._forget_evaluations_after(self.step)
        self.run_dir.rewind(self.step + 1)
        if found is None:
            return
        weights = type(self.policy.model).from_pretrained(found.path, dtype=self.policy.model.dtype)
        self.policy.model.load_state_dict(weights.state_dict())
        self.optimizer.load(found.path)
        await self.engine.update_weights(None, self.step)
        logger.info("resuming after step %d of %d from %s", self.step, self.config.steps, found.path)

    def _forget_evaluations_after(self, step: int) -> None:
        """Dev evaluations of steps that will be done again were of other weights."""
        for folder in (self.run_dir.path / "evaluations").glob("dev-*"):
            if int(folder.name.removeprefix("dev-")) > step:
                shutil.rmtree(folder)


@contextmanager
def _recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Let layers recompute their activations, where gradient checkpointing is on.

    They do so in training mode only, which would cost the engine its cache and everyone dropout: so
    the layers alone are in it, and only now.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    layers = [layer for layer in layers if layer.gradient_checkpointing]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def draw_questions(questions: Sequence[Question], count: int, step: int, seed: int) -> list[Question]:
    """The questions of a step: a new order every epoch, which depends on nothing but seed and step."""
    chosen = []
    for position in range(step * count, (step + 1) * count):
        epoch, index = divmod(position, len(questions))
        chosen.append(questions[_order(len(questions), f"{seed}/{epoch}")[index]])
    return chosen


@lru_cache(maxsize=4)
def _order(count: int, key: str) -> list[int]:
    return random.Random(key).sample(range(count), count)


def _whole_groups(trajectories: Sequence[Trajectory], group_size: int) -> list[Trajectory]:
    """The groups in which no search failed: a group short of a member has another baseline."""
    groups = [trajectories[i : i + group_size] for i in range(0, len(trajectories), group_size)]
    whole = [g for g in groups if all(t.stop_reason is not StopReason.SEARCH_FAILED for t in g)]
    return [trajectory for group in whole for trajectory in group]


def reward_metrics(rewards: torch.Tensor, group_size: int) -> dict[str, float]:
    """Mean and spread of rewards (B,), and how many groups say nothing because all rewards agree."""
    groups = rewards.view(-1, group_size)
    flat = (groups.max(1).values == groups.min(1).values).float().mean()
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std(correction=0)),
        "rollout/groups": float(len(groups)),
        "rollout/zero_variance_groups": float(flat),
    }


def rollout_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """What the trajectories of a step did, on average."""
    count = len(trajectories)

    def mean(values) -> float:
        return sum(values) / count

    stops = Counter(t.stop_reason for t in trajectories)
    return {
        "rollout/em": mean(exact_match(t.answer, t.question.gold_answers) for t in trajectories),
        "rollout/searches": mean(len(t.searches) for t in trajectories),
        "rollout/valid_format": mean(t.valid_format for t in trajectories),
        "rollout/invalid_actions": mean(t.invalid_actions for t in trajectories),
        "rollout/policy_tokens": mean(sum(t.loss_mask) for t in trajectories),
        "rollout/total_tokens": mean(len(t.token_ids) for t in trajectories),
        **{f"stop/{reason}": stops[reason] / count for reason in StopReason},
    }
