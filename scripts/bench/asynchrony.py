"""The share of the waiting for a slow retriever that asynchronous training hides, of what can be hidden.

    python -m scripts.bench.asynchrony [--latency_seconds 0.3] [--staleness '[0, 1, 2]'] [--seeds 3]

Short runs of `sleuth train --config scripts/configs/atlas.yaml`: the packaged policy, the embedded world, its
index in process behind a delay that any number of searches spend at the same time. Seconds are those of the
training steps, evaluations left out, on a clock of its own: the CPU time of this process (one thread) and
what the event loop would have slept. So what else runs on the machine changes little, and nothing is
waited for. `--real true` sleeps, and reads the wall clock.

policy      seconds that the process computed: rollouts, rewards and updates, which share it
retriever   seconds in which at least one search was under way
bound       seconds of the synchronous run / seconds of its slower stage. The share of it that is reached may
            be above 1 where that is the retriever, whose searches then overlap more
speed-up    seconds of the synchronous run / seconds of this run
lag         updates from the oldest weights that wrote in a trajectory to those it trained
|log r|     mean difference of the log-probs of trainer and sampler, nats a token
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from data.records import Hit
from data.run_dir import read_metrics
from retriever_server.client.search_client import SearchClient, connect
from rl.config import TrainConfig
from scripts.quickstart import RECIPE, build_world


@dataclass
class Clock:
    """Seconds so far of a run."""

    real: bool
    slept: float = 0.0
    searching: float = 0.0
    searches: int = 0
    _since: float = 0.0

    def time(self) -> float:
        """Now."""
        return time.monotonic() if self.real else time.process_time() + self.slept

    def rule(self, loop: Any) -> None:
        """Let the event loop go by this clock, which counts what it sleeps."""
        select = loop._selector.select

        def counted(timeout: float | None = None) -> Any:
            if not self.real:
                self.slept += timeout or 0.0
                return select(0)
            started = time.monotonic()
            try:
                return select(timeout)
            finally:
                self.slept += time.monotonic() - started

        loop._selector.select, loop.time = counted, self.time

    def enter(self) -> None:
        """A search begins."""
        if not self.searches:
            self._since = self.time()
        self.searches += 1

    def leave(self) -> None:
        """A search ends."""
        self.searches -= 1
        if not self.searches:
            self.searching += self.time() - self._since


class SlowClient(SearchClient):
    """Another client, each answer of which comes so many seconds late."""

    def __init__(self, inner: SearchClient, seconds: float, clock: Clock) -> None:
        self.inner, self.seconds, self.clock = inner, seconds, clock

    async def search(self, query: Any, k: int) -> list[Hit]:
        """The hits of the other client."""
        self.clock.enter()
        try:
            await asyncio.sleep(self.seconds)
            return await self.inner.search(query, k)
        finally:
            self.clock.leave()

    def query_style(self) -> str | None:
        """Return the style of the other client."""
        return self.inner.query_style()

    async def __aenter__(self) -> SearchClient:
        self.clock.rule(asyncio.get_running_loop())
        return self

    async def close(self) -> None:
        """Close the other client."""
        await self.inner.close()


@dataclass(frozen=True)
class Run:
    """The time and the outcome of a run."""

    seconds: float
    policy: float
    retriever: float
    em: float
    staleness: float
    difference: float


def train_once(config: TrainConfig, latency_seconds: float, real: bool) -> Run:
    """One training; its stages are measured until the end of its last step."""
    from rl.trainer import Trainer
    from scripts.train import train

    clock, marks, one_step = Clock(real), [], Trainer._one_step

    async def timed_step(self: Trainer) -> None:
        before = clock.slept, clock.searching, clock.time()
        await one_step(self)
        marks.append((before, (clock.slept, clock.searching, clock.time())))

    Trainer._one_step = timed_step
    try:
        train(config, SlowClient(connect(config.retriever), latency_seconds, clock))
    finally:
        Trainer._one_step = one_step
    slept, searching, seconds = (sum(after[i] - before[i] for before, after in marks) for i in range(3))
    rows = read_metrics(config.out)
    steps = [row for row in rows if "reward/mean" in row]
    return Run(
        seconds,
        seconds - slept,
        searching,
        next(row["dev/em"] for row in rows if "dev/em" in row),
        mean(row.get("rollout/staleness", 0.0) for row in steps),
        mean(row["policy/sampler_difference"] for row in steps if "policy/sampler_difference" in row),
    )


def main(
    out: str = "runs/asynchrony",
    latency_seconds: float = 0.3,
    staleness: Sequence[int] = (0, 1, 2),
    seeds: int = 1,
    steps: int = 10,
    questions_per_step: int = 16,
    group_size: int = 8,
    dev: int = 200,
    real: bool = False,
) -> None:
    """Train with each staleness and seed, and print a row for each; staleness 0 must come first."""
    build_world(Path(out) / "world")
    from scripts.command_line import call

    base = call(_recipe, ["--config", str(RECIPE), f"--out={out}"], prog="asynchrony")
    world = Path(out) / "world"
    load = f"{steps} steps of {questions_per_step} x {group_size}"
    print(f"{latency_seconds:g} s a search, {load}, {'wall clock' if real else 'CPU time and sleep'}")
    print("seed staleness seconds policy retriever speed-up bound  share dev EM  lag |log r|")
    for seed in range(seeds):
        first: Run | None = None
        for bound in staleness:
            rollout = replace(
                base.rollout,
                questions_per_step=questions_per_step,
                group_size=group_size,
                max_staleness=bound,
                max_rows=2 * questions_per_step * group_size,
            )
            config = replace(
                base,
                questions=str(world / "train.jsonl"),
                dev_questions=str(world / "dev.jsonl"),
                retriever=str(world / "index"),
                out=str(Path(out) / f"staleness-{bound}-seed-{seed}-{os.getpid()}"),
                rollout=rollout,
                algorithm=replace(base.algorithm, importance="token"),
                steps=steps,
                eval_every=steps,
                eval_limit=dev,
                save_every=steps,
                seed=seed,
            )
            run = train_once(config, latency_seconds, real)
            first = first or run
            print(_row(seed, bound, run, first), flush=True)


def _row(seed: int, bound: int, run: Run, first: Run) -> str:
    best, reached = first.seconds / max(first.policy, first.retriever), first.seconds / run.seconds
    times = f"{run.seconds:7.1f} {run.policy:6.1f} {run.retriever:9.1f} {reached:8.2f} {best:5.2f}"
    learned = f"{run.em:6.3f} {run.staleness:4.2f} {run.difference:7.4f}"
    return f"{seed:4} {bound:9} {times} {reached / best:6.1%} {learned}"


def _recipe(config: TrainConfig) -> TrainConfig:
    return config


if __name__ == "__main__":
    from scripts.__main__ import run_script

    run_script(main)
