"""Our rollouts and rewards for TRL's GRPOTrainer, by `SearchEnvironment(...)` (docs/trl.md).

A trajectory goes in as the ledger has it: prompt and completion ids as they were sampled, an `env_mask`
that is 0 on every token the policy did not write, and the `Trajectory` itself for the reward functions.
Written against TRL 1.16, whose `rollout_func` is experimental.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from agent.engines.base import Sampling
from agent.engines.hf import HFEngine
from agent.prompt import frozen_frame
from agent.protocol import Protocol, get_protocol
from agent.rollout import Agent
from agent.trajectory import StopReason, Trajectory
from data.errors import ConfigError, RunStopped, require
from data.questions import load_questions
from data.records import Question
from retriever_server.client.search_client import SearchClient, connect
from rl.algorithm.rewards import check_questions, combine
from rl.config import JudgeConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from trl.trainer.grpo_trainer import GRPOTrainer

_log = logging.getLogger(__name__)

RewardFunction = Callable[..., list[float | None]]

_AS_SAMPLED = "the log-probs of the loss are those of the whole vocabulary"
_REQUIRED: dict[str, tuple[tuple[object, ...], str]] = {
    "mask_truncated_completions": ((False,), "a trajectory ends at a closing tag: all would be masked"),
    "use_vllm": ((False,), "the environment samples from the trainer's own model"),
    "top_p": ((1,), _AS_SAMPLED),
    "top_k": ((0, None), _AS_SAMPLED),
    "min_p": ((None, 0), _AS_SAMPLED),
    "repetition_penalty": ((1,), _AS_SAMPLED),
    "chat_template_kwargs": (
        (None, {}),
        "the protocol has them: replace(SEARCH_R1, chat_template_kwargs=...)",
    ),
    "generation_kwargs": ((None, {}), "the limits of the protocol and the temperature are all there is"),
}
"""Fields of GRPOConfig, what they may be, and why."""


class SearchEnvironment:
    """The `dataset`, `reward_funcs(...)` and `rollout_func` of a GRPOTrainer."""

    def __init__(
        self,
        questions: str | Sequence[Question],
        retriever: str | SearchClient,
        protocol: str | Protocol = "search_r1",
        max_rows: int = 128,
        max_failed_share: float = 0.1,
        deadline_seconds: float = 60.0,
    ) -> None:
        """Raises ConfigError or DataError.

        questions: see `data.questions.load_questions`, or the questions themselves. retriever: URL of a
        server or index folder. protocol: a name, or a `Protocol` with limits of your own. max_rows:
        trajectories sampled at once. max_failed_share: of a batch whose searches may fail before training
        stops; deadline_seconds: how long one is retried before that.
        """
        require(max_rows >= 1, "max_rows", max_rows, ">= 1")
        require(0 <= max_failed_share <= 1, "max_failed_share", max_failed_share, "in [0, 1]")
        self.client = connect(retriever, deadline_seconds) if isinstance(retriever, str) else retriever
        self.protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
        self.max_rows, self.max_failed_share, self._rollouts = max_rows, max_failed_share, 0
        self._questions: dict[str, Question] = {}  # by the prompt of their row
        found = load_questions(questions) if isinstance(questions, str) else questions
        self.dataset = self.add_questions(found)

    def add_questions(self, questions: Sequence[Question]) -> Dataset:
        """Make further questions known, such as those of an `eval_dataset`, and return their rows.

        TRL hands a rollout nothing but the prompt: where another question has the same text, the id follows.
        """
        from datasets import Dataset

        prompts = []
        for question in questions:
            known = self._questions.setdefault(question.text, question)
            prompts.append(question.text if known == question else f"{question.text} ({question.id})")
            self._questions[prompts[-1]] = question
        return Dataset.from_dict({"prompt": prompts})

    def reward_funcs(self, *names: str, judge: JudgeConfig | None = None) -> list[RewardFunction]:
        """A reward function for each name that the `rewards` of a recipe take (docs/rl.md).

        They read the trajectory, never a text. Where a search or the judge failed they give None, which
        TRL leaves out of the mean of the group.
        """
        check_questions(dict.fromkeys(names, 1.0), list(self._questions.values()))
        return [_reward_function(name, judge) for name in names]

    def rollout_func(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        """One trajectory a prompt (TRL has repeated each for its group), from the trainer's model as it is.

        Returns `prompt_ids`, `completion_ids`, `logprobs` and `env_mask`, and `trajectory` for the reward
        functions. Raises ConfigError where a setting of the trainer would falsify the loss, RunStopped
        where too many searches failed.
        """
        _check_settings(trainer)
        for prompt in prompts:
            if not isinstance(prompt, str) or prompt not in self._questions:
                raise ConfigError(f"prompt {str(prompt)[:60]!r}: must be of .dataset or .add_questions(...)")
        trajectories = _run_now(self._roll_out([self._questions[p] for p in prompts], trainer))
        self._check_failures(trajectories)
        columns = zip(*(_ledger(t, _tokenizer(trainer).pad_token_id) for t in trajectories), strict=True)
        names = ("prompt_ids", "completion_ids", "logprobs", "env_mask")
        return {**dict(zip(names, map(list, columns), strict=True)), "trajectory": trajectories}

    async def _roll_out(self, questions: list[Question], trainer: GRPOTrainer) -> list[Trajectory]:
        tokenizer, step = _tokenizer(trainer), trainer.state.global_step
        args: Any = trainer.args
        model: Any = trainer.model
        # A new engine each time: what its cache took is free again while the trainer updates.
        engine = HFEngine(model, tokenizer, self.max_rows)
        await engine.update_weights(None, step)
        sampling = Sampling(temperature=args.temperature)
        frame = frozen_frame(Path(args.output_dir), self.protocol, tokenizer)
        agent = Agent(
            engine, tokenizer, self.client, self.protocol, sampling, 2 * self.max_rows, prompt_frame=frame
        )
        self._rollouts += 1
        seed = hash((args.seed, trainer.accelerator.process_index, step, self._rollouts))
        training = model.training
        model.eval()  # dropout would sample from a policy that nobody means to train
        try:
            with trainer.accelerator.autocast():
                async with self.client:  # its connections belong to this event loop
                    return await agent.rollout(questions, seed)
        finally:
            model.train(training)

    def _check_failures(self, trajectories: Sequence[Trajectory]) -> None:
        failed = [t for t in trajectories if _search_failed(t)]
        if failed:
            error = failed[0].searches[-1].error
            what = f"{len(failed)} of {len(trajectories)} trajectories lost ({error})"
            if len(failed) > self.max_failed_share * len(trajectories):
                raise RunStopped(
                    f"{what}; allowed: {self.max_failed_share:.0%}; go on from the last checkpoint with "
                    "trainer.train(resume_from_checkpoint=True)"
                )
            _log.warning("%s: they stay out of the loss", what)


def _check_settings(trainer: GRPOTrainer) -> None:
    args: Any = trainer.args
    for name, (allowed, why) in _REQUIRED.items():
        value = getattr(args, name)
        if value not in allowed:
            raise ConfigError(f"GRPOConfig.{name} = {value!r}: must be {allowed[0]!r} here: {why}")
    require(args.temperature > 0, "GRPOConfig.temperature", args.temperature, "> 0")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ConfigError("FSDP and DeepSpeed: must be off here: each process samples from a whole model")


def _reward_function(name: str, judge: JudgeConfig | None) -> RewardFunction:
    earned = combine({name: 1.0}, judge or JudgeConfig())

    def reward(trajectory: Sequence[Trajectory], log_metric: Any = None, **_: Any) -> list[float | None]:
        logged = {
            "rollout/searches": [len(t.searches) for t in trajectory],
            "rollout/valid_format": [t.valid_format for t in trajectory],
            "stop/search_failed": [_search_failed(t) for t in trajectory],
        }
        for key, values in logged.items() if log_metric else ():
            log_metric(key, fmean(values))  # TRL averages what several functions log
        rewards = iter(earned([t for t in trajectory if not _search_failed(t)]))
        found = [None if _search_failed(t) else next(rewards) for t in trajectory]
        # TRL has no advantage of a turn: one sum a trajectory.
        return [None if r is None or r.error else r.total for r in found]

    reward.__name__ = name  # TRL logs it as rewards/<name>
    return reward


def _search_failed(trajectory: Trajectory) -> bool:
    return trajectory.stop_reason is StopReason.SEARCH_FAILED


def _ledger(trajectory: Trajectory, filler: int) -> tuple[list[int], list[int], list[float], list[int]]:
    """Prompt ids, completion ids, log-probs and env_mask; never an empty completion: TRL fails."""
    prompt = trajectory.segments[0].token_ids
    completion, mask = trajectory.token_ids[len(prompt) :], trajectory.loss_mask[len(prompt) :]
    if not completion:
        return prompt, [filler], [0.0], [0]
    if _search_failed(trajectory):
        mask = [0] * len(mask)
    logprobs = zip(trajectory.logprobs[len(prompt) :], mask, strict=True)
    return prompt, completion, [(value or 0.0) * m for value, m in logprobs], mask


def _tokenizer(trainer: GRPOTrainer) -> Any:
    processing = trainer.processing_class
    return getattr(processing, "tokenizer", processing)  # that of a processor, where it is one


def _run_now(work: Coroutine[Any, Any, list[Trajectory]]) -> list[Trajectory]:
    """Its result, awaited here; in a thread where an event loop runs already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
