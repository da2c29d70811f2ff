"""The loop of search-RL (Search-R1, arXiv 2503.09516), whatever the algorithm.

A step: draw questions, let the agent answer them with live searches, reward the answers, update the policy
on the tokens it wrote. A group in which a search or a reward failed is left out of the update.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from agent.engines.base import Sampling
from agent.evaluation.evaluate import evaluate
from agent.evaluation.records import iterate_records, trajectory_table
from agent.rollout import Agent
from agent.trajectory import Trajectory
from agent.transcripts import to_record
from data.checkpoint import Checkpoint, best_checkpoint, latest_checkpoint, mark_best, save_checkpoint
from data.errors import EngineError, RunStopped
from data.jsonl import read_json, read_jsonl, write_json, write_jsonl
from data.progress import Bar, no_bar
from data.records import Question
from data.run_dir import RunDir, read_metrics
from rl.algorithm.rewards import combine
from rl.config import TrainConfig
from rl.diagnosis import WINDOW, find_obstacle
from rl.learner.learner import Learner
from rl.learner.workers import Totals, Workers
from rl.rollouts import Collected, Rollouts
from rl.sentinel import Sentinel
from rl.weight_sync import WeightSync, probe_prompts

logger = logging.getLogger(__name__)

STATE_FILE = "trainer.json"
IN_FLIGHT_FILE = "in_flight.jsonl"
"""Groups that were not yet trained on."""


class Trainer:
    """Trains one policy, in one process or as one of several. `run` is the whole of it."""

    def __init__(
        self,
        config: TrainConfig,
        learner: Learner,
        agent: Agent,
        questions: Sequence[Question],
        dev_questions: Sequence[Question],
        run: RunDir | None,
        workers: Workers,
        on_step: Callable[[int], None] | None = None,
        bar: Bar = no_bar,
    ) -> None:
        """run: the run folder, which the leading process has and the others have not; bar: shows progress."""
        self.config, self.learner, self.run_dir, self.workers = config, learner, run, workers
        self.dev_questions = dev_questions
        rollout = config.rollout
        self.agent = replace(
            agent,
            sampling=Sampling(
                rollout.temperature, rollout.top_p, rollout.top_k, renormalise=rollout.renormalise_logprobs
            ),
        )
        self.sync = WeightSync(
            agent.engine, learner, config.engine, workers, probe_prompts(agent), self.agent.sampling
        )
        self.path = Path(config.out)
        reward = combine(config.rewards, config.judge, self.path / f"judge-{workers.rank}.jsonl")
        self.bar = bar if workers.leads else no_bar
        self.rollouts = Rollouts(self.agent, questions, reward, config, workers)
        self.checkpoints = self.path / "checkpoints"
        self.on_step = on_step
        self.recent: deque[dict[str, Any]] = deque(maxlen=WINDOW)
        self.said: set[str] = set()
        self.step = self.roll_backs = 0

    async def run(self) -> None:
        """Train to the last step, resuming from the last checkpoint; state is saved however it ends."""
        await self._restore()
        try:
            await self._all_steps()
        except (asyncio.CancelledError, RunStopped, EngineError) as stop:
            # Interrupted processes are at different places: none can ask the others for their shards.
            if self.workers.count == 1 or isinstance(stop, RunStopped):
                self._save()
                if isinstance(stop, EngineError):
                    saved = f"the state is saved in {self.path}: start the same command again to go on"
                    raise RunStopped(f"{stop}; {saved}") from stop
            raise
        finally:
            await self.rollouts.close()
        if not self.config.eval_every and self.workers.leads:
            mark_best(self.checkpoints, self.step, score=0.0)

    async def _all_steps(self) -> None:
        if self._due(self.config.eval_every) and not self._evaluated():
            await self._evaluate()  # the last start was stopped in the middle of it
        while self.step < self.config.steps:
            await self._one_step()
            if self._due(self.config.eval_every):
                await self._evaluate()
            elif self._due(self.config.save_every):
                self._save()
            if self.on_step:
                self.on_step(self.step)

    async def _one_step(self) -> None:
        started = time.monotonic()
        total = self.rollouts.share * self.config.rollout.group_size
        with self.bar("answering questions", total) as move:
            collected = await self.rollouts.collect(self.step, move)
        rollout_seconds = time.monotonic() - started

        def update() -> list[Totals]:
            learned = self.learner.learn(collected, self.step)
            self.step += 1  # also where the run is interrupted meanwhile
            return learned

        with self.bar("updating the policy"):
            learned = await self._beside_rollouts(update)
        if self.config.keep_rollouts_every and self.step % self.config.keep_rollouts_every == 0:
            self._keep(collected)
        synced = await self.sync.update(self.step)
        seconds = time.monotonic() - started
        metrics = self.workers.average([collected.totals, *learned]) | synced
        rollout = self.config.rollout
        drawn = collected.drawn * rollout.group_size
        metrics |= {
            "rollout/groups": float(collected.count),
            "time/rollout_seconds": rollout_seconds,
            "time/update_seconds": seconds - rollout_seconds,
            "time/step_seconds": seconds,
            "time/tokens_per_second": drawn * metrics["rollout/total_tokens"] / seconds,
            "time/trajectories_per_second": drawn / (seconds if rollout.max_staleness else rollout_seconds),
        }
        if self.run_dir is not None:
            self.run_dir.log(self.step, metrics)
        await self._apply_alarm(metrics)

    async def _beside_rollouts(self, update: Callable[[], list[Totals]]) -> list[Totals]:
        """Do the update in a thread, while asynchronous rollouts go on; to its end, if it is interrupted.

        An engine that shares the model stands still meanwhile, with the event loop.
        """

        def on_device() -> list[Totals]:
            device = self.learner.model.device  # a thread has a current CUDA device of its own
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                return update()

        if not self.config.rollout.max_staleness or self.agent.engine.shares_model:
            return on_device()
        updating = asyncio.ensure_future(asyncio.to_thread(on_device))
        try:
            return await asyncio.shield(updating)
        except asyncio.CancelledError:
            await updating
            raise

    def _keep(self, collected: Collected) -> None:
        """Write the trajectories of this step to disk, without their tokens."""
        rows = [
            {**to_record(trajectory, tokens=False), "reward": reward.total, "group": group.number}
            for group in collected.groups
            for trajectory, reward in zip(group.trajectories, group.rewards, strict=True)
        ]
        write_jsonl(self.path / "rollouts" / f"step-{self.step:06d}-{self.workers.rank}.jsonl", rows)

    async def _apply_alarm(self, metrics: dict[str, float]) -> None:
        """Warn, stop or go back where the sentinel, the same in all processes, sees a collapse."""
        verdict = self.sentinel.watch(self.step, metrics)
        if self.run_dir is not None:
            self._say_obstacle(metrics)
            for alarm in verdict.alarms:
                logger.warning("sentinel: %s", alarm)
        alarms = "; ".join(verdict.alarms)
        if verdict.action == "stop":
            raise RunStopped(f"sentinel: {alarms}; the state is saved in {self.path}")
        coefficient = self.config.sentinel.preserve_coefficient
        if verdict.action == "preserve" and self.learner.config.algorithm.llds_coefficient < coefficient:
            logger.warning("sentinel: preserving likelihood from here on (LLDS %g)", coefficient)
            self.learner.preserve(coefficient)
        if verdict.action == "roll_back":
            best = best_checkpoint(self.checkpoints)
            if best is None or self.roll_backs == self.config.sentinel.max_roll_backs:
                why = f"rolled back {self.roll_backs} times already" if best else "no best checkpoint yet"
                raise RunStopped(f"sentinel: {alarms}; {why}; the state is saved in {self.path}")
            logger.warning("sentinel: going back to the weights of step %d", best[0].step)
            self.roll_backs += 1
            self.learner.read(best[0].path)
            await self.rollouts.close()  # it was written by what is left behind
            await self.sync.update(self.step)
            self._save()

    def _say_obstacle(self, metrics: dict[str, float]) -> None:
        """Warn, once of each, where the last steps have left nothing to learn from."""
        self.recent.append(metrics)
        if len(self.recent) < WINDOW:
            return
        obstacle = find_obstacle(list(self.recent), self.config, self.agent.protocol.name)
        if obstacle is not None and obstacle.name not in self.said:
            self.said.add(obstacle.name)
            logger.warning("the last %d steps have nothing to learn from: %s", WINDOW, obstacle)

    async def _evaluate(self) -> None:
        """Greedy EM on the dev questions, by the leading process; the best so far keeps its checkpoint."""
        metrics = await self._dev_metrics() if self.run_dir is not None else {}
        self._save()
        if self.run_dir is not None:
            best = best_checkpoint(self.checkpoints)
            if best is None or metrics["dev/em"] > best[1]:
                mark_best(self.checkpoints, self.step, metrics["dev/em"])
            self.run_dir.log(self.step, metrics)  # last: it says that this evaluation is done

    async def _dev_metrics(self) -> dict[str, float]:
        greedy = replace(self.agent, sampling=Sampling(temperature=0))

        async def rollout(questions: Sequence[Question], on_finished: Callable[[Trajectory], None]) -> None:
            total = len(self.dev_questions)
            done = itertools.count(total - len(questions) + 1)
            with self.bar("answering dev questions", total, total - len(questions)) as move:

                def finished(_: int, trajectory: Trajectory) -> None:
                    on_finished(trajectory)
                    move(next(done))

                await greedy.rollout(questions, on_finished=finished)

        folder = self.path / "evaluations" / f"dev-{self.step:06d}"
        settings = {"policy": f"step {self.step}", "protocol": self.agent.protocol.name}
        started = time.monotonic()
        scores = await evaluate(self.dev_questions, rollout, folder, settings)
        if self.run_dir is not None and self.config.wandb.project:
            table = trajectory_table(iterate_records(folder))
            self.run_dir.tracker.table(self.step, "dev/trajectories", *table)
        return {
            "dev/em": scores["em"]["mean"],
            "dev/searches": scores["searches_per_question"],
            "time/evaluate_seconds": time.monotonic() - started,
        }

    def _evaluated(self) -> bool:
        rows = read_metrics(self.path) if self.workers.leads else []
        done = any(row["step"] == self.step and "dev/em" in row for row in rows)
        return self.workers.gather(done)[0]

    def _due(self, every: int) -> bool:
        """Tell whether a thing done every so many steps, and after the last, is due; 0 is never."""
        if not every or not self.step:
            return False
        return self.step == self.config.steps or self.step % every == 0

    def _save(self) -> None:
        parts = self.learner.snapshot()
        kept = [record for part in self.workers.gather(self.rollouts.kept()) for record in part]
        state = {"position": self.rollouts.settled, "roll_backs": self.roll_backs}
        preserved = self.learner.config.algorithm.llds_coefficient
        if preserved != self.config.algorithm.llds_coefficient:
            state["llds_coefficient"] = preserved

        def write(folder: Path) -> None:
            self.learner.write(folder, parts)
            write_json(folder / STATE_FILE, state)
            if kept:
                write_jsonl(folder / IN_FLIGHT_FILE, sorted(kept, key=lambda record: record["number"]))

        if self.workers.leads:
            save_checkpoint(self.checkpoints, self.step, write, self.config.keep_checkpoints)
        self.workers.wait()

    async def _restore(self) -> None:
        """The state of the last checkpoint. All else follows from the seed and from what was drawn."""
        found = self.workers.gather(latest_checkpoint(self.checkpoints))[0]
        self.step = found.step if found else 0
        if self.run_dir is not None:
            self._forget_evaluations_after(self.step)
            self.run_dir.rewind(self.step + 1)
        history = self.workers.gather(self.run_dir and read_metrics(self.path))[0]
        self.sentinel = Sentinel(self.config.sentinel, history)
        if found is not None:
            await self._load(found)
            logger.info("resuming after step %d of %d from %s", self.step, self.config.steps, found.path)
        elif not self.agent.engine.shares_model:
            await self.sync.update(self.step)  # servers that are joined may hold another run's weights
        self.workers.wait()

    async def _load(self, checkpoint: Checkpoint) -> None:
        self.learner.read(checkpoint.path)
        state = read_json(checkpoint.path / STATE_FILE)
        self.roll_backs = state["roll_backs"]
        if "llds_coefficient" in state:
            self.learner.preserve(state["llds_coefficient"])
        await self.sync.update(self.step)
        file = checkpoint.path / IN_FLIGHT_FILE
        kept = list(read_jsonl(file)) if file.exists() else []
        self.rollouts.restore(state["position"], kept, self.step)

    def _forget_evaluations_after(self, step: int) -> None:
        """Dev evaluations of steps that will be done again were of other weights."""
        for folder in (self.path / "evaluations").glob("dev-*"):
            if int(folder.name.removeprefix("dev-")) > step:
                shutil.rmtree(folder)
