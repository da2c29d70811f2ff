"""The needs of policies of 3, 7 and 32 billion weights in documented layouts: memory, and seconds a step.

    python -m scripts.bench.sizes

No weights are needed, and no GPU: the shapes are those of Qwen2.5; bytes and FLOPs come from `rl.estimate`,
which is behind `sleuth train --dry-run`. The batch is Search-R1's: 512 questions, 5 trajectories each.
Seconds are of a roofline: FLOPs at `SHARE` of a GPU's peak; decoding reads the weights, and the cache of each
row, once a step of all rows. Nothing else is in them: no search, no hand-over, no waiting for the longest.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from transformers import Qwen2Config

from agent.engines.config import EngineConfig
from agent.protocol import SEARCH_R1
from data.settings import LoraConfig
from rl.config import RolloutConfig, TrainConfig
from rl.estimate import Lengths, ResourceEstimate, peak

SHAPES = {
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
}
"""Width, inner width, layers, heads, key-value heads, vocabulary, tied embeddings."""
SHARE = 0.4
"""Share of a GPU's peak that matrix products of many tokens reach."""
LENGTHS: Lengths = (390.0, 1400.0, 1.0)
"""A trajectory of Search-R1: tokens written, in all; all are fed."""


class Card(NamedTuple):
    """A GPU: bytes, FLOPs a second in bfloat16, bytes a second from its memory."""

    memory: float
    flops: float
    bandwidth: float


CARDS = {"H100": Card(80e9, 989e12, 3.35e12), "H200": Card(141e9, 989e12, 4.8e12)}


class Layout(NamedTuple):
    """So many GPUs train; so many servers, each on `parallel` GPUs, sample (0: the trainers do)."""

    policy: str
    card: str
    trainers: int
    servers: int
    parallel: int = 1
    lora: int = 0
    rows: int = 256
    micro_batch_tokens: int = 16384


LAYOUTS = (
    Layout("3B", "H100", 1, 0, rows=32, micro_batch_tokens=8192),
    Layout("3B", "H100", 8, 0, rows=128),
    Layout("3B", "H100", 4, 4),
    Layout("7B", "H100", 8, 0, rows=48),
    Layout("7B", "H100", 4, 4, rows=128),
    Layout("7B", "H100", 8, 8, rows=128),
    Layout("32B", "H100", 16, 8, 2, rows=64),
    Layout("32B", "H200", 8, 4, 2, lora=16, rows=128, micro_batch_tokens=8192),
)


def needs_of(layout: Layout, folder: Path) -> ResourceEstimate:
    """Return what `sleuth train --dry-run` would compute with."""
    width, inner, layers, heads, kv_heads, vocabulary, tied = SHAPES[layout.policy]
    Qwen2Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
    ).save_pretrained(folder)
    config = TrainConfig(
        policy=str(folder),
        questions="",
        retriever="",
        out="",
        device="cpu",
        dtype="bfloat16",
        rollout=RolloutConfig(512, 5, max_rows=layout.rows),
        lora=LoraConfig(rank=layout.lora),
        sharding="none" if layout.lora or layout.trainers == 1 else "fsdp",
        micro_batch_tokens=layout.micro_batch_tokens,
        gradient_checkpointing=True,
    )
    served = replace(config, engine=EngineConfig(name="vllm", servers=layout.servers or 1))
    return ResourceEstimate(served if layout.servers else config, layout.trainers)


def seconds_of(layout: Layout, needs: ResourceEstimate) -> tuple[float, float]:
    """Return the roofline's seconds of a step: rollout, update."""
    card = CARDS[layout.card]
    samplers = layout.servers * layout.parallel or layout.trainers
    engines = layout.servers or layout.trainers
    rate = SHARE * card.flops
    parts = needs.seconds(LENGTHS, (rate, rate))
    reading = parts.pop("reading prompts and observations") * layout.trainers / samplers
    products = parts.pop("writing") * layout.trainers / samplers
    written, total, _ = LENGTHS
    steps = 512 * 5 / engines / layout.rows * written
    cache = layout.rows * total / 2 * needs.cached_bytes()
    moved = steps * (needs.whole * 2 + cache) / (layout.parallel * card.bandwidth)
    return reading + max(products, moved), sum(parts.values())


def line(layout: Layout, folder: Path) -> str:
    """A row of the table."""
    needs = needs_of(layout, folder)
    card, longest = CARDS[layout.card], needs.longest(SEARCH_R1)
    memory = needs.memory(int(longest[1]))
    trainer = peak(memory) / 1e9
    server = sum(needs.server_memory(longest[1]).values()) / layout.parallel / 1e9 if layout.servers else 0.0
    rollout, update = seconds_of(layout, needs)
    fits = max(trainer, server) * 1e9 < 0.92 * card.memory
    always = memory["always"]
    cached = sum(size for name, size in always.items() if "KV cache" in name)
    parts = [sum(always.values()) - cached, cached, sum(memory["update"].values()), trainer * 1e9]
    samplers = f"{layout.servers} x {layout.parallel}" if layout.servers else "the same"
    how = f"LoRA {layout.lora}" if layout.lora else "all weights"
    cells = [layout.policy, how, f"{layout.trainers} {layout.card}", samplers]
    cells += [f"{size / 1e9:.0f}" for size in parts]
    cells += [f"{server:.0f}" if server else "", "yes" if fits else "**no**"]
    return "| " + " | ".join([*cells, f"{rollout:.0f} + {update:.0f}"]) + " |"


def main() -> None:
    """Print the table."""
    names = ["policy", "trained", "trainers", "servers x GPUs", "weights, moments", "cache", "update", "peak"]
    names += ["server, a GPU", "fits", "rollout + update, s"]
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    with tempfile.TemporaryDirectory(prefix="sleuth-sizes-") as folder:
        for layout in LAYOUTS:
            print(line(layout, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
