"""`sleuth warm-start`: teach a policy the protocol from demonstrations, before it learns by itself."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

from data.atlas.demonstrations import Demonstrator
from data.errors import ConfigError
from rl.config import ProtocolConfig, WarmStartConfig

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
        demonstrations: JSONL file of demonstrations (docs/data-formats.md), such as `sleuth demonstrations`
            makes.
        invented: Instead of a file: so many demonstrations over invented worlds, where no name is real.
        invented_seed: Of the invented worlds.
        demonstrator: How the searcher of the invented demonstrations behaves.
        protocol: How the policy is to speak, and its limits.
        training: How long and how fast.
    """
    if bool(demonstrations) == bool(invented):
        raise ConfigError("give either demonstrations (a file) or invented (a number), not both or none")
    if invented < 0:
        raise ConfigError(f"invented = {invented}: must be >= 0")
    from agent.policy_folder import find_policy
    from rl.demonstrations import (
        check_out,
        demonstration_spans,
        describe_demonstrations,
        load_demonstrations,
    )
    from scripts.console import StepLines, say
    from scripts.wiring import make_protocol

    if policy != "new":
        find_policy(policy)
    spoken = make_protocol(protocol, policy)
    if demonstrations:
        spans = load_demonstrations(demonstrations, spoken)
        source = describe_demonstrations(demonstrations)
    else:
        from data.atlas.demonstrations import demonstrations as invent

        spans = [list(demonstration_spans(d, spoken)) for d in invent(invented, invented_seed, demonstrator)]
        source = {"invented": invented, "invented_seed": invented_seed, "demonstrator": asdict(demonstrator)}
    limits = {key: value for key, value in vars(spoken).items() if type(value) is int}
    record = {"policy": policy, **source, "protocol": {"name": spoken.name, **limits}}
    check_out(Path(out), {**record, "training": asdict(training)})
    if policy == "new":
        from data.plugins import find_plugin

        make_seed_policy = find_plugin("examples.seed_policy.seed_policy.make_seed_policy", "policy = new")
    size = f"{training.steps:,} steps of {training.batch_size} demonstrations"
    say(f"warm start of {policy}: {size}, into {out}")
    from agent.policy import load_policy
    from rl.warm_start import warm_start

    if policy == "new":
        from data.packaged import WIRED_IN

        logger.info(WIRED_IN)
        texts = (text for demonstration in spans[:4000] for _, text in demonstration)
        start = make_seed_policy(texts, spoken, seed=training.seed)
    else:
        frozen_half = training.lora.rank > 0 and training.precision == "bfloat16"
        start = load_policy(policy, dtype="bfloat16" if frozen_half else "float32")
    lines = StepLines(_SHOWN)
    with lines.bar("training") as progress:
        warm_start(start, spans, spoken, Path(out), training, lines, progress, record)
    print(f"{out}: learnt from {len(spans):,} demonstrations")
