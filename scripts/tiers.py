"""Help in two tiers: `--help` shows the options that matter, with an example; `--help-all` shows all."""

from __future__ import annotations

from argparse import SUPPRESS
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser


class Tier(NamedTuple):
    """What `--help` of a command shows: these options beside the required ones, and an example."""

    options: Collection[str]
    example: str


_AGENT = ("protocol.name", "protocol.top_k", "protocol.max_turns", "engine.name", "engine.urls", "device")
TIERS = {
    "train": Tier(
        (
            "preset", "split", "dev_questions", "protocol.name", "rollout.questions_per_step",
            "rollout.group_size", "algorithm.learning_rate", "algorithm.kl_coefficient", "rewards", "steps",
            "eval_every", "save_every", "engine.name", "lora.rank", "micro_batch_tokens", "device", "resume",
            "dry_run", "seed", "ray.address", "wandb.project",
        ),
        "sleuth train --config scripts/configs/search_r1_grpo.yaml --steps 200 --out runs/mine",
    ),
    "train-retriever": Tier(
        (
            "out", "passage_template", "steps", "epochs", "batch_size", "accumulate", "learning_rate",
            "warmup", "matryoshka", "lora.rank", "precision", "serves", "dev.queries", "dev.qrels",
            "save_every", "export", "device", "resume", "seed", "wandb.project",
        ),
        "sleuth train-retriever --config scripts/configs/retriever/bge.yaml --out runs/retriever",
    ),
    "evaluate": Tier(
        (*_AGENT, "split", "limit", "temperature", "seed", "max_rows", "deadline_seconds"),
        "sleuth evaluate --policy atlas --questions test.jsonl --retriever runs/index --out runs/scores",
    ),
    "ask": Tier(
        (*_AGENT, "temperature", "seed", "deadline_seconds"),
        'sleuth ask "Who wrote it?" --policy atlas --retriever runs/index',
    ),
    "warm-start": Tier(
        (
            "policy", "demonstrations", "invented", "protocol.name", "training.steps", "training.batch_size",
            "training.learning_rate", "training.learn_everything", "training.seed",
        ),
        "sleuth warm-start --policy smollm2 --demonstrations demos.jsonl --out runs/warm",
    ),
    "serve": Tier(
        (
            "others", "host", "port", "port_file", "workers", "token_file", "admin_token_file",
            "allowed_hosts", "dialect", "topk", "max_topk", "watch_seconds", "drain_seconds", "request_log",
            "mcp",
        ),
        "sleuth serve --index runs/index --port 8000",
    ),
    "index": Tier(
        (
            "corpus", "out", "encoder", "kind", "k1", "b", "analyzer", "language", "title_boost", "dtype",
            "query_prompt", "passage_prompt", "passage_template", "max_tokens", "dimension", "on_error",
            "shard", "device", "overwrite", "verify",
        ),
        "sleuth index --corpus corpus.jsonl --out runs/index",
    ),
    "quickstart": Tier(
        ("out", "seed", "steps", "limit", "resume", "engine.name"),
        "sleuth quickstart --out runs/quickstart --steps 10 --limit 50",
    ),
}  # fmt: skip


def _protocols() -> Collection[str]:
    from agent.protocol import PROTOCOLS

    return PROTOCOLS


def _presets() -> Collection[str]:
    from rl.algorithm.presets import PRESETS

    return PRESETS


def _rewards() -> Collection[str]:
    from rl.algorithm.rewards import REWARDS

    return [*REWARDS, "judge"]


NAMES: dict[str, Callable[[], Collection[str]]] = {
    "preset": _presets, "rewards": _rewards, "protocol.name": _protocols,
}  # fmt: skip
"""Option -> the names that it knows, from the very table."""


def with_tier(parser: ArgumentParser, command: str, argv: list[str]) -> list[str]:
    """argv with one spelling of help; names are put into the help, and `--help` is cut to its tier."""
    everything = "--help-all" in argv
    if not everything and not {"-h", "--help"} & set(argv):
        return argv
    tier = TIERS.get(command)
    for action in parser._actions:
        if action.dest in NAMES and isinstance(action.help, str):
            action.help += f" Known: {', '.join(NAMES[action.dest]())}."
        if tier and not everything and not _matters(action, tier):
            action.help = SUPPRESS
    if tier:
        rest = "" if everything else " `--help-all` lists all options."
        parser.epilog = f"Example: {tier.example}.{rest}"
    return ["--help" if word == "--help-all" else word for word in argv]


def _matters(action: Any, tier: Tier) -> bool:
    return action.required or action.dest in ("help", "config", "print_config", *tier.options)
