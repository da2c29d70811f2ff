"""`sleuth warm-start`: teach a policy the protocol from demonstrations, before it learns by itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agent.protocol import Protocol
from data.atlas.demonstrations import Demonstrator
from data.errors import ConfigError, require
from data.models.packaged import WIRED_IN
from data.objects.plugins import find_plugin
from data.text import counted
from rl.config import ProtocolConfig, WarmStartConfig
from scripts.console import StepLines, say

logger = logging.getLogger(__name__)

_SHOWN = {
    "train/loss": "loss {:.4g}",
    "train/mean_token_accuracy": "token accuracy {:.3f}",
    "speed/examples_per_second": "{:.1f} demonstrations/s",
}
"""Metrics on the line of a step."""


def main(
    out: str,
    policy: str = "new",
    demonstrations: str | None = None,
    invented: int = 0,
    invented_seed: int = 0,
    demonstrator: Demonstrator = Demonstrator(),  # noqa: B008 (frozen)
    protocol: ProtocolConfig = ProtocolConfig(name="compact"),  # noqa: B008 (frozen)
    training: WarmStartConfig = WarmStartConfig(),  # noqa: B008 (frozen)
) -> None:
    """Fine-tune a policy on demonstrations of searching, with TRL's SFTTrainer.

    The same command goes on after the last checkpoint of one that was stopped. Demonstrations that exceed the
    protocol's limits are cut, or left out, as a rollout would be.

    Args:
        out: Folder for the policy.
        policy: Folder or name of the policy to start from; new makes the seed policy (examples/seed_policy).
        demonstrations: JSONL file of demonstrations (docs/data-formats.md).
        invented: Instead of a file: so many demonstrations over invented worlds, where no name is real.
        invented_seed: Of the invented worlds.
        demonstrator: How the searcher of the invented demonstrations behaves.
        protocol: How the policy is to speak, and its limits.
        training: How long and how fast.
    """
    if bool(demonstrations) == bool(invented):
        raise ConfigError("give either demonstrations (a file) or invented (a number), not both or none")
    require(invented >= 0, "invented", invented, ">= 0")
    from agent.policy_folder import find_policy
    from data.atlas.demonstrations import demonstrations as invent
    from rl.demonstrations import check_out, demonstration_spans, describe_demonstrations, load_demonstrations
    from scripts.wiring import make_protocol

    if policy != "new":
        find_policy(policy)
    spoken = make_protocol(protocol, policy)
    if demonstrations:
        spans = load_demonstrations(demonstrations, spoken)
        source = describe_demonstrations(demonstrations)
    else:
        worlds = invent(invented, invented_seed, demonstrator)
        spans = [list(demonstration_spans(each, spoken)) for each in worlds]
        source = {"invented": invented, "invented_seed": invented_seed, "demonstrator": asdict(demonstrator)}
    limits = {key: value for key, value in vars(spoken).items() if type(value) is int}
    record = {"policy": policy, **source, "protocol": {"name": spoken.name, **limits}}
    check_out(Path(out), {**record, "training": asdict(training)})
    say(f"warm start of {policy}: {counted(training.steps, 'step')} of {training.batch_size}, into {out}")
    start = _starting_policy(policy, spans, spoken, training)
    from rl.warm_start import warm_start

    lines = StepLines(_SHOWN)
    with lines.bar("training") as progress:
        warm_start(start, spans, spoken, Path(out), training, lines, progress, record)
    print(f"{out}: learnt from {counted(len(spans), 'demonstration')}")


def _starting_policy(
    name: str, spans: Sequence[Sequence[Any]], protocol: Protocol, training: WarmStartConfig
) -> Any:
    """Make the seed policy, its tokenizer from the demonstrations, or load one.

    The types are not named: jsonargparse would import torch for every --help.
    """
    if name != "new":
        from agent.policy import load_policy

        frozen_half = training.lora.rank > 0 and training.precision == "bfloat16"
        return load_policy(name, dtype="bfloat16" if frozen_half else "float32")
    make_seed_policy = find_plugin("examples.seed_policy.seed_policy.make_seed_policy", "policy = new")
    logger.info(WIRED_IN)
    texts = (text for demonstration in spans[:4000] for _, text in demonstration)
    return make_seed_policy(texts, protocol, seed=training.seed)
