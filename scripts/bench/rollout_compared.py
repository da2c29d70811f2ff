"""Runs the sides of `scripts.bench.rollout --passages` (rollout_engines.py, rollout_trl.py), and compares."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from agent.engines.config import EngineConfig
from agent.policy import Policy
from data.errors import ConfigError
from scripts.bench.rollout_engines import PROTOCOL, Outcome, ServerSide, Work, make_work, run_hf

SIDES = ("hf", "vllm", "trl")


def compare(
    policy: Policy,
    source: str,
    folder: Path,
    counts: Sequence[int],
    repeats: int,
    sides: Sequence[str],
    config: EngineConfig,
) -> None:
    """Run all sides with so many trajectories, after a short warm-up of ours; print what they did."""
    if not set(sides) <= set(SIDES):
        raise ConfigError(f"sides = {list(sides)}: must be of {', '.join(SIDES)}")
    with tempfile.TemporaryDirectory(prefix="sleuth-rollout-") as scratch:
        everything = make_work(policy, folder, max(counts), Path(scratch) / "bm25")
        _time_searches(everything)
        server = None
        runs: dict[str, Callable[[Work, int], Outcome]] = {"hf": run_hf}
        try:
            if "vllm" in sides:
                runs["vllm"] = server = ServerSide(everything, config, source, Path(scratch))
            for side in sides:
                if side != "trl":
                    runs[side](_first(everything, 2), -1)
            for count in counts:
                work = _first(everything, count)
                if "trl" in sides:
                    from scripts.bench.rollout_trl import TRLSide

                    runs["trl"] = TRLSide(work)
                _measure(work, {side: runs[side] for side in sides}, repeats, server)
        finally:
            if server is not None:
                server.close()


def _first(work: Work, count: int) -> Work:
    return replace(work, questions=work.questions[:count])


def _time_searches(work: Work) -> None:
    queries = [question.text for question in work.questions]
    started = time.perf_counter()
    for query in queries:
        work.retriever.search([query], PROTOCOL.top_k)
    spent = (time.perf_counter() - started) / len(queries)
    print(f"{spent * 1000:.1f} ms a search alone")


def _measure(
    work: Work, runs: dict[str, Callable[[Work, int], Outcome]], repeats: int, server: ServerSide | None
) -> None:
    count = len(work.questions)
    outcomes: dict[str, list[Outcome]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name, run in runs.items():
            outcomes[name].append(run(work, repeat))
            print(f"  {count} trajectories, {name}: {outcomes[name][-1].seconds:.2f} s", file=sys.stderr)
    for name, done in outcomes.items():
        median = sorted(done)[len(done) // 2]
        seconds = ", ".join(f"{each.seconds:.2f}" for each in done)
        against = sorted(outcomes["hf"])[repeats // 2].seconds / median.seconds if "hf" in outcomes else 1.0
        print(
            f"{count} trajectories, {name:<4} {count / median.seconds:7.3f} trajectories/s "
            f"{median.sampled / median.seconds:8.1f} tokens/s; {median.sampled:,} sampled, {median.read:,} "
            f"read, {median.searches} searches; seconds {seconds}, of the processor "
            f"{median.processor_seconds:.1f}; {against:.2f} times hf"
        )
    if server is not None:
        print(f"  of vllm's server in its last run: {server.cached}")
