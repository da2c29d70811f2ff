"""`sleuth train`: a policy, questions and a retriever in; a policy that searches better out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from data.errors import ConfigError
from rl.config import TrainConfig

if TYPE_CHECKING:
    from data.records import Question
    from retriever_server.client import SearchClient

logger = logging.getLogger(__name__)


def main(config: TrainConfig) -> None:
    """Train a policy to search by GRPO on the rewards of its own answers.

    The same command again resumes after the last checkpoint; `sleuth report OUT` draws the curves.
    """
    train(config)
    print(f"trained: `sleuth report {config.out}` draws its curves")


def train(
    config: TrainConfig,
    client: SearchClient | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Run or resume the training that `config` describes; `client` stands in for `config.retriever`.

    Raises KeyboardInterrupt, its state saved, with the words that say how to go on.
    """
    from data.questions import load_questions

    questions = load_questions(config.questions, config.split)
    dev = (
        load_questions(config.dev_questions, config.dev_split, config.eval_limit)
        if config.dev_questions
        else []
    )
    _check(config)
    from data.run_dir import RunDir
    from rl.seed_policy import WIRED_IN
    from rl.trainer import CONSOLE_KEYS

    notes = [WIRED_IN] if config.policy == "atlas" else []
    settings = {key: value for key, value in asdict(config).items() if key != "resume"}
    with RunDir(config.out, settings, config.resume, notes, logger.info, CONSOLE_KEYS) as run:
        if config.wandb.project:
            from data.trackers import WandbTracker

            run.tracker = WandbTracker(
                run.path, config.wandb.project, run.path.name, run.path.name, settings, config.wandb.mode
            )
        try:
            asyncio.run(_train(config, run, client, questions, dev, on_step))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; the state is saved in {config.out}: start the same command again to go on"
            ) from None


def _check(config: TrainConfig) -> None:
    """What can be wrong with a configuration that no field knows alone, before a model loads."""
    from rl.rewards import combine

    combine(config.rewards)
    if config.deterministic and config.retriever.startswith("http"):
        raise ConfigError(f"deterministic: needs an index folder as retriever, not {config.retriever}")


async def _train(
    config: TrainConfig,
    run,
    client: SearchClient | None,
    questions: Sequence[Question],
    dev: Sequence[Question],
    on_step: Callable[[int], None],
) -> None:
    import torch

    from agent.policy import load_policy
    from rl.trainer import Trainer
    from scripts.wiring import open_agent

    if config.deterministic:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
    rollout = config.rollout
    opened = open_agent(
        config.policy,
        config.retriever,
        config.protocol,
        rollout.temperature,
        rollout.max_rows,
        config.device,
        config.dtype,
        rollout.retriever_deadline_seconds,
        client,
    )
    if config.gradient_checkpointing:
        opened.policy.model.gradient_checkpointing_enable()
    reference = (
        load_policy(config.policy, config.device, config.dtype) if config.algorithm.kl_coefficient else None
    )
    async with opened.client:
        trainer = Trainer(config, opened.policy, opened.agent, questions, dev, run, reference, on_step)
        await trainer.run()
