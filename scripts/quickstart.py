"""`sleuth quickstart`: from the embedded corpus to a policy that has learned to search, and its report.

Each phase leaves its result in the run folder and is passed over where that is there already:
world/ (corpus, questions, index), evaluations/before, checkpoints, evaluations/after, report.html.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from agent.engines.config import EngineConfig
from data.checkpoint import best_checkpoint
from data.errors import EngineError, RetrieverUnavailable, require
from data.jsonl import read_json
from data.machine.managed_process import ManagedProcess
from data.questions import load_questions
from data.run_dir import RunStatus
from rl.config import TrainConfig
from scripts.console import going_on, show_table
from scripts.phases import Phases
from scripts.train import open_run

RECIPE = Path(__file__).parent / "configs" / "quickstart.yaml"
TITLE_BOOST = 3
SERVER_SECONDS = 60.0
PHASES_LEAVE = ("world", "phases.json", "evaluations", "server.log", "server.port")
"""Files that the phases before training write into the run folder."""
STOP_SECONDS = 30


def main(
    out: str = "runs/quickstart",
    seed: int = 0,
    steps: int | None = None,
    limit: int | None = None,
    resume: bool = False,
    engine: EngineConfig = EngineConfig(),  # noqa: B008 (frozen)
) -> None:
    """Build a corpus, serve it, and train a small policy to search it; before and after, it is tested.

    The same command again goes on where it stopped.

    Args:
        out: Run folder.
        seed: Of the training.
        steps: Training steps; none: those of the recipe scripts/configs/quickstart.yaml.
        limit: Only the first so many test questions; none: all of them.
        resume: Go on with the run in `out` though steps have changed.
        engine: What samples: this process, or vLLM servers.
    """
    require(limit is None or limit >= 1, "limit", limit, ">= 1")
    run = Path(out)
    with going_on(out):
        _quickstart(run, replace(read_recipe(run, seed, steps, resume), engine=engine), limit)


def _quickstart(run: Path, config: TrainConfig, limit: int | None) -> None:
    from agent.evaluation.report.page import write_report

    if not (run / "run.json").exists():  # so that the folder is taken, and no other's
        begun = open_run(config, {}, tracked=False, beside=PHASES_LEAVE)
        begun.close(RunStatus.INTERRUPTED, "its training has not begun")
    phases = Phases(run / "phases.json")
    with phases.timed("world"):
        build_world(run / "world")
    with serve(run / "world" / "index", run) as url:
        print(f"retriever: {url}", flush=True)
        with phases.timed("evaluate before"):
            evaluate_policy(config, url, "before", config.policy, limit)
        with phases.timed("train"):
            train_policy(config, url)
        with phases.timed("evaluate after"):
            evaluate_policy(config, url, "after", trained_policy(run), limit)
    with phases.timed("report"):
        report = write_report(run)
    show_results(run, phases.seconds)
    print(f"policy: {trained_policy(run)}\nreport: {report}")


def read_recipe(run: Path, seed: int, steps: int | None, resume: bool) -> TrainConfig:
    """The recipe with this run's folders in it."""
    from scripts.command_line import call

    def recipe(config: TrainConfig) -> TrainConfig:
        return config

    world = run / "world"
    values = {
        "questions": world / "train.jsonl",
        "dev_questions": world / "dev.jsonl",
        "retriever": world / "index",
        "out": run,
        "seed": seed,
        "resume": resume,
    } | ({} if steps is None else {"steps": steps})
    argv = [f"--{key}={value}" for key, value in values.items()]
    return call(recipe, ["--config", str(RECIPE), *argv], prog="sleuth quickstart")


def build_world(folder: Path) -> None:
    """Write corpus, questions and index, unless they are there."""
    from data.atlas.build import build_atlas
    from data.corpus import Corpus
    from retriever_server.indexes.bm25 import BM25Index

    if not (folder / "test.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        build_atlas(folder)
    if not (folder / "index" / "manifest.json").exists():
        BM25Index.build(Corpus(folder / "corpus.jsonl"), folder / "index", title_boost=TITLE_BOOST)


@contextmanager
def serve(index: Path, run: Path) -> Iterator[str]:
    """A retriever server on a free port, as a process of its own; its URL. Stopped at the end.

    Raises RetrieverUnavailable if it does not come up; run/server.log says why.
    """
    port_file = run / "server.port"
    port_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "scripts", "serve", "--index", str(index), "--port", "0"]
    log = run / "server.log"
    log.write_bytes(b"")
    server = ManagedProcess([*command, "--port_file", str(port_file)], log, grace_seconds=STOP_SECONDS)
    try:
        deadline = time.monotonic() + SERVER_SECONDS
        while not port_file.exists():
            if server.status is not None or time.monotonic() > deadline:
                raise RetrieverUnavailable(f"the retriever server did not start: see {log}")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port_file.read_text().strip()}"
    finally:
        server.stop(STOP_SECONDS)
        port_file.unlink(missing_ok=True)


def evaluate_policy(config: TrainConfig, url: str, name: str, policy: str, limit: int | None) -> None:
    """Greedy evaluation on the test questions, into evaluations/NAME; goes on where it stopped."""
    from agent.evaluation.evaluate import evaluate
    from scripts.evaluate import rollout_with_bar
    from scripts.wiring import open_agent, retriever_generation

    folder = Path(config.out) / "evaluations" / name
    questions = load_questions(str(Path(config.questions).with_name("test.jsonl")), limit=limit)
    rows, engine = config.rollout.max_rows, config.engine
    opened = open_agent(policy, url, config.protocol, max_rows=rows, engine=engine, folder=folder)

    async def run() -> None:
        async with opened:
            await opened.check()
            settings = {
                "policy": name,
                "retriever": await retriever_generation(opened.client, questions[0].text, url),
                **opened.settings(),
            }
            rollout = rollout_with_bar(opened, 0, len(questions), folder)
            await evaluate(questions, rollout, folder, settings)

    asyncio.run(run())


def train_policy(config: TrainConfig, url: str) -> None:
    """GRPO with live searches at `url`; resumes, and does nothing once it is finished."""
    from retriever_server.client.search_client import connect
    from scripts.train import print_conclusion, train

    train(config, connect(url, config.rollout.retriever_deadline_seconds))
    print_conclusion(config)


def trained_policy(run: Path) -> str:
    """The folder of the best checkpoint on dev, by a link that is easy to type: RUN/policy."""
    best = best_checkpoint(run / "checkpoints")
    if best is None:
        raise EngineError(f"{run / 'checkpoints'}: holds no best checkpoint though training has ended")
    link = run / "policy"
    link.unlink(missing_ok=True)
    link.symlink_to(best[0].path.relative_to(run))
    return str(link)


def show_results(run: Path, seconds: dict[str, float]) -> None:
    """Print the table of before and after, by kind of question, and where the time went."""
    from agent.evaluation.compare import paired_difference
    from agent.evaluation.records import read_records
    from data.metrics.significance import format_estimate

    folders = [run / "evaluations" / name for name in ("before", "after")]
    before, after = (read_json(folder / "scores.json") for folder in folders)
    paired = paired_difference(*(read_records(folder) for folder in folders))
    rows: list[tuple[str, Any, Any, Any]] = [("all", before, after, paired)]
    rows += [(k, before["by_kind"][k], after["by_kind"][k], paired["by_kind"][k]) for k in before["by_kind"]]
    scores, habits = [], []
    for kind, old, new, difference in rows:
        scores.append([kind, *(format_estimate(part["em"]) for part in (old, new, difference))])
        names = ("searches_per_question", "valid_format_rate")
        habits.append([kind, old["n"], *(f"{part[name]:.2f}" for name in names for part in (old, new))])
    show_table("", ("questions", "EM before", "EM after", "difference"), scores)
    show_table("", ("questions", "n", "searches before", "after", "valid format before", "after"), habits)
    print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
