"""`sleuth train`: a policy, questions and a retriever in; a policy that searches better out."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from data.checkpoint import latest_checkpoint
from data.errors import ConfigError, EngineError, SleuthError
from data.machine.listening import why_silent
from data.models.packaged import SEED_POLICIES
from data.questions import load_questions
from data.records import hash_questions
from data.run_dir import RunDir, RunStatus, defaults_of, has_results, read_config, read_metrics
from data.settings import WandbConfig
from data.text import counted
from rl.config import SentinelConfig, TrainConfig
from scripts.console import StepLines, bar, say

if TYPE_CHECKING:
    from agent.policy import Policy
    from data.records import Question
    from retriever_server.client.search_client import SearchClient
    from rl.estimate import Steps
    from rl.learner.workers import Workers

logger = logging.getLogger(__name__)

_SHOWN = {
    "reward/mean": "reward {:.3f}",
    "rollout/em": "EM {:.3f}",
    "dev/em": "dev EM {:.3f}",
    "rollout/searches": "searches {:.1f}",
    "dev/searches": "searches {:.1f}",
    "time/step_seconds": "{:.1f} s",
    "time/evaluate_seconds": "{:.1f} s",
}
"""Metrics on the line of a step; all of them lie in metrics.jsonl."""


def main(config: TrainConfig) -> None:
    """Train a policy to search on the rewards of its own answers.

    `--preset NAME` sets all algorithm fields but the recipe's (learning rates, warm-up); what follows on
    the line wins over it. `--dry-run` only prints what the run will need. `--ray ADDRESS` lets Ray place
    trainers, engines and retrievers (docs/scaling.md). `--from search_r1 FILE` (or verl) prints the recipe of
    their configuration. The same command again resumes after the last
    checkpoint; `sleuth report OUT` draws the curves.
    """
    if config.dry_run:
        return _dry_run(config)
    if config.ray.address is not None:
        _launch(config)
        return print_conclusion(config)
    conclude(config, train(config))


def conclude(config: TrainConfig, workers: Workers) -> None:
    """Say what came of it, and end a process that is one of several."""
    if workers.leads:
        print_conclusion(config)
    workers.exit()


def print_conclusion(config: TrainConfig) -> None:
    """Say what the training changed, or why it could change nothing."""
    from rl.diagnosis import conclude
    from scripts.wiring import make_protocol

    protocol = make_protocol(config.protocol, config.policy).name
    print(conclude(read_metrics(config.out), config, protocol))
    print(f"`sleuth report {config.out}` draws its curves")


def _dry_run(config: TrainConfig) -> None:
    """Print what the run will need; where one process trains, here, two small steps are measured."""
    from agent.policy_folder import find_policy
    from scripts.wiring import make_protocol

    find_policy(config.policy)
    protocol = make_protocol(config.protocol, config.policy)
    from rl.estimate import estimate_text
    from rl.learner.workers import join_workers

    workers = join_workers()
    if workers.leads:
        count = config.ray.trainers if config.ray.address else workers.count
        here = count == 1 and not config.ray.address and config.engine.shares_model
        measure = partial(measure_step, config) if here else None
        print(estimate_text(config, protocol, count, measure))
    workers.leave()


def measure_step(config: TrainConfig, questions: int) -> Steps | None:
    """Return lengths and seconds of a step, from the second of two over fewer questions; nothing is kept.

    None, with a warning that says why, where they cannot be taken here.
    """
    from rl.estimate import recent_steps

    class Measured(Exception):
        """Ends the run without a checkpoint."""

    def stop(step: int) -> None:
        if step == 2:
            raise Measured

    wanted = config.rollout.questions_per_step
    logger.info("measuring: two steps of %d of %d questions", questions, wanted)
    rollout = replace(config.rollout, questions_per_step=questions, max_staleness=0)
    apart = {"dry_run": False, "eval_every": 0, "dev_questions": None, "steps": 3, "save_every": 3}
    apart |= {"rollout": rollout, "sentinel": SentinelConfig(), "wandb": WandbConfig()}
    with TemporaryDirectory() as out:
        try:
            train(replace(config, out=out, **apart), on_step=stop)
        except SleuthError as error:
            logger.warning("not measured: %s", error)
        except Measured:
            pass
        except KeyboardInterrupt:  # there is no state to go on from
            raise KeyboardInterrupt from None
        found = recent_steps(out, last=1)
    if found is None:
        return None
    lengths, seconds, _ = found
    return lengths, seconds * wanted / questions, f"as in a trial of {questions} of {wanted} questions"


def _launch(config: TrainConfig) -> None:
    """Let Ray start the trainers, once it is seen here that they will find nothing wrong."""
    from agent.policy_folder import find_policy
    from scripts.on_ray.launch import launch
    from scripts.wiring import make_protocol

    find_policy(config.policy)  # devices and engines are those of other machines
    make_protocol(config.protocol, config.policy)
    questions, dev = _questions(config)
    _check(config, questions)
    run = open_run(config, hash_inputs(config, questions, dev), tracked=False)
    run.close(RunStatus.INTERRUPTED, "its trainers did not start")
    launch(config)


def expand(argv: list[str]) -> list[str]:
    """argv with the value of `--ray`.

    `--from TRAINER FILE` prints the recipe of another trainer's configuration, and that is all.
    """
    from scripts.command_line import joined

    if argv[:1] == ["--from"]:
        from scripts.foreign_recipe import print_recipe

        if len(argv) != 3:
            raise ConfigError("--from needs a trainer and its file: --from search_r1 train_grpo.sh")
        print_recipe(*argv[1:])
        raise SystemExit(0)
    expanded: list[str] = []
    for word in joined(argv):
        option, _, value = word.partition("=")
        if option == "--ray":  # alone, or with the address
            word = f"--ray.address={value or 'local'}"
        expanded.append(word)
    return expanded


def train(
    config: TrainConfig,
    client: SearchClient | None = None,
    on_step: Callable[[int], None] | None = None,
    here: TrainConfig | None = None,
) -> Workers:
    """Run or resume the training that `config` describes; `client` stands in for `config.retriever`.

    here: the same, with engines and retriever where a launcher has started them.
    Returns this process's place among those of the run.
    Raises KeyboardInterrupt, its state saved, with the words that say how to go on.
    """
    from retriever_server.open_retriever import plan_retriever
    from scripts.wiring import check_agent, open_client

    here = here or config
    check_agent(here.policy, here.protocol, here.device, here.engine)
    questions, dev = _questions(config)
    _check(here, questions)
    inputs = hash_inputs(config, questions, dev)
    retriever = (here.retriever, here.rollout.retriever_deadline_seconds)
    if client is None and here.retriever.startswith(("http://", "https://")):
        client = open_client(*retriever, here.deterministic)
    elif client is None:
        plan_retriever(*retriever)  # to be opened once the run is found to go on
    lines = StepLines(_SHOWN, config.steps)
    with open_run(config, inputs, lines) if _leads() else nullcontext() as run:
        try:
            client = client or open_client(*retriever, here.deterministic)
            if _leads():
                size = f"{here.rollout.questions_per_step} questions x {here.rollout.group_size} trajectories"
                say(f"training {here.policy}: {counted(here.steps, 'step')} of {size}, into {here.out}")
            from rl.learner.workers import join_workers

            workers = join_workers()
            found = latest_checkpoint(Path(config.out) / "checkpoints")
            with lines.bar("training", found.step if found else 0) if _leads() else nullcontext():
                asyncio.run(_train(here, run, workers, client, questions, dev, on_step))
            workers.leave()
        except KeyboardInterrupt:
            saved = "the state is saved" if workers.count == 1 else "the last checkpoint is kept"
            raise KeyboardInterrupt(
                f"interrupted; {saved} in {config.out}: start the same command again to go on"
            ) from None
    return workers


def _questions(config: TrainConfig) -> tuple[list[Question], list[Question]]:
    """The questions to train on, and those of dev."""
    from rl.question_mix import check_kinds

    questions = load_questions(config.questions, config.split, normalizer=config.normalizer)
    check_kinds(config.rollout, questions)
    if config.dev_questions is None:
        return questions, []
    dev = load_questions(config.dev_questions, config.dev_split, config.eval_limit, config.normalizer)
    return questions, dev


def hash_inputs(
    config: TrainConfig, questions: Sequence[Question], dev: Sequence[Question]
) -> dict[str, tuple[str, str]]:
    """The data that a resumed run must find again, for `RunDir`."""
    sets = {"questions": (config.questions, questions), "dev_questions": (config.dev_questions or "", dev)}
    return {name: (source, hash_questions(of)) for name, (source, of) in sets.items() if of}


def _leads() -> bool:
    """Return whether this is the first process of the run, as every launcher tells."""
    return os.environ.get("RANK", "0") == "0"


def _check(config: TrainConfig, questions: Sequence[Question]) -> None:
    """Raise where rewards, questions and judge do not go together, before a model loads."""
    from rl.algorithm.rewards import check_questions, combine

    combine(config.rewards, config.judge)
    check_questions(config.rewards, questions, config.algorithm)
    if "judge" in config.rewards and (reason := why_silent(str(config.judge.url))):
        raise EngineError(f"judge.url = {config.judge.url!r}: nobody listens ({reason})")


def open_run(
    config: TrainConfig,
    inputs: Mapping[str, tuple[str, str]],
    on_log: Callable[[int, Mapping[str, float]], None] = lambda step, metrics: None,
    tracked: bool = True,
    beside: Collection[str] = (),
) -> RunDir:
    """The folder of the run; ConfigError where another process writes it or it is of another configuration.

    How the run is spread over machines is no part of its configuration. The rest: see `RunDir`.
    """
    from data.trackers import check_tracker, open_tracker
    from rl.demonstrations import warm_start_notes

    if tracked:
        check_tracker(config.wandb)
    notes = SEED_POLICIES.get(config.policy) or warm_start_notes(config.policy)
    apart = ("resume", "dry_run", "ray")
    settings = {key: value for key, value in asdict(config).items() if key not in apart}
    _check_text(config)
    # Of each field but `rewards`, whose keys are the user's: what a run of before the field was there has.
    defaults = defaults_of(config) | {"rewards": {}}
    defaults["protocol"]["titles"] = config.protocol.titles  # they have been checked
    run = RunDir(
        config.out, settings, config.resume, notes, on_log, inputs=inputs, beside=beside, defaults=defaults
    )
    if tracked:
        run.tracker = open_tracker(run.path, settings, config.wandb)
    return run


def _check_text(config: TrainConfig) -> None:
    """Raise ConfigError where a run that was begun on other titles would go on with those of `config`."""
    from scripts.wiring import make_protocol

    began = read_config(config.out).get("protocol", {})
    changed = make_protocol(config.protocol, config.policy).titles == "quoted" and "titles" not in began
    if changed and has_results(config.out):
        raise ConfigError(
            f"{config.out} holds a run whose policy was shown titles without quotes: "
            "--protocol.titles unquoted goes on with them, another --out begins a new run"
        )


async def _train(
    config: TrainConfig,
    run: RunDir | None,
    workers: Workers,
    client: SearchClient,
    questions: Sequence[Question],
    dev: Sequence[Question],
    on_step: Callable[[int], None] | None,
) -> None:
    import torch

    from agent.policy import load_policy
    from agent.prompt import frozen_frame
    from data.machine.device import resolve_device
    from rl.learner.learner import Learner
    from rl.trainer import Trainer
    from scripts.wiring import open_agent

    rollout = config.rollout
    if config.deterministic:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
    sharded = workers.count > 1 and config.sharding == "fsdp"
    # What writes the weights of servers need not lie on a GPU beside the shares.
    aside = sharded and not config.engine.shares_model and config.device == "auto"

    def another(dtype: str) -> Policy:  # what is divided goes to its GPU layer by layer: a whole may not fit
        return load_policy(config.policy, "cpu" if sharded else config.device, dtype)

    opened = open_agent(
        config.policy,
        config.retriever,
        config.protocol,
        rollout.temperature,
        rollout.max_rows,
        "auto" if aside else resolve_device(config.device),
        config.dtype,
        rollout.retriever_deadline_seconds,
        client,
        config.engine,
        Path(config.out),
    )
    dtype = str(opened.policy.model.dtype).removeprefix("torch.")
    trained = another("float32") if sharded else opened.policy  # the engine needs whole weights
    near = config.algorithm.needs_reference and not config.lora.rank
    protocol = opened.agent.protocol
    learner = Learner(trained, config, protocol, workers, another(dtype) if near else None)
    kept = run and frozen_frame(run.path, protocol, opened.policy.tokenizer)
    agent = replace(opened.agent, prompt_frame=workers.gather(kept)[0])
    async with opened:
        await Trainer(config, learner, agent, questions, dev, run, workers, on_step, bar).run()
