"""`sleuth train-retriever`: examples in, a retriever (or a reranker) that serves out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from data.progress import no_bar
from data.run_dir import RunDir
from retriever_server.training.recipe import RetrieverRecipe
from scripts.console import StepLines, bar, going_on

logger = logging.getLogger(__name__)

_SHOWN = {
    "train/loss": "loss {:.4g}",
    "train/learning_rate": "learning rate {:.1e}",
    "dev/nDCG@10": "dev nDCG@10 {:.4f}",
    "dev/R@100": "R@100 {:.4f}",
    "dev/RR@10": "RR@10 {:.4f}",
    "speed/examples_per_second": "{:.1f} examples/s",
}
"""Metrics on the line of a step; all of them lie in metrics.jsonl."""


def main(config: RetrieverRecipe) -> None:
    """Train a dense, sparse or multi-vector retriever, or a reranker, on examples.

    scripts/configs/retriever/ holds a recipe a method. OUT/model is what `sleuth index --encoder` takes;
    the same command again resumes after the last checkpoint. `accelerate launch --num_processes N -m
    scripts train-retriever ...` trains in N processes.
    """
    leads = os.environ.get("RANK", "0") == "0"  # as every launcher tells
    from retriever_server.training.build_components import prepare

    prepared = prepare(config)
    with ExitStack() as stack:
        opened = _open_run(config, prepared.inputs, stack) if leads else (None, lambda step, steps: None)
        run, progress = opened
        from retriever_server.training.run import train

        with going_on(config.out, "the last checkpoint is kept"):
            folder = train(
                config,
                run.log if run else (lambda step, metrics: None),
                progress,
                (lambda step: run.rewind(step + 1)) if run else (lambda step: None),
                bar if leads else no_bar,
                prepared,
            )
    if leads:
        print(f"trained: {folder} (`sleuth index --encoder {folder} ...` builds an index with it)")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from data.models.sharding import end_at_once

        end_at_once()


def _open_run(
    config: RetrieverRecipe, inputs: Mapping[str, tuple[str, str]], stack: ExitStack
) -> tuple[Any, Callable[[int, int], None]]:
    from data.trackers import check_tracker, open_tracker

    check_tracker(config.wandb)
    settings = {key: value for key, value in asdict(config).items() if key != "resume"}
    lines = StepLines(_SHOWN)
    run = stack.enter_context(
        RunDir(config.out, settings, config.resume, (), lines, inputs=inputs, defaults=config)
    )
    progress = stack.enter_context(lines.bar("training"))
    run.tracker = open_tracker(run.path, settings, config.wandb)
    return run, progress
