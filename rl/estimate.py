"""What a training run will need, before it starts: memory by part, disk, seconds a step.

The policy is built without its weights, on torch's meta device, so that one of any size is measured in
seconds. Bytes follow from its shapes; seconds from FLOPs over rates that are measured on this machine.
How long trajectories are only the run can tell: they are as in the steps that it has made, else as long
as the protocol allows, and then all is a bound.

Not in it: searches, evaluations, further rounds of dynamic sampling, traffic between processes, and what
calls cost beside their matrix products: a third of the time of a model of 100 million parameters on a
CPU, two thirds at one million. Experts count as if all worked.
"""

from __future__ import annotations

import math
import os
import resource
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from agent.engines.hf import CACHE_BLOCK_TOKENS
from agent.policy import default_protocol, resolve_device, resolve_policy
from agent.protocol import get_protocol
from data.errors import ConfigError
from data.run_dir import read_metrics
from rl.config import TrainConfig
from rl.lora import add_lora

PROMPT_TOKENS = 256
"""Allowed for the instruction and the question."""
CHUNK_TOKENS, LOGIT_COPIES = 256, 4
"""The scorer has logits of so many tokens at once, in float32: those, their log-probs, the product for
the entropy, a gradient."""


@dataclass(frozen=True)
class Part:
    """A part of what is needed. Parts of different phases are never there at once, those of "" always."""

    name: str
    size: float
    """Bytes."""
    phase: str = ""


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a trajectory, and the share of trajectories that there is something to learn from."""

    written: float
    """By the policy."""
    total: float
    fed: float
    source: str
    """Where they are known from."""


@dataclass(frozen=True)
class Rates:
    """FLOPs a second of products with the model's matrices: of many tokens, and of one a trajectory, which
    is bound by reading the matrices."""

    update: float
    decode: float


@dataclass(frozen=True)
class Shape:
    """The policy and what is trained, in numbers of parameters, and in bytes of each."""

    config: Any
    """Of its text model."""
    head_size: int
    """Of one attention head."""
    whole: int
    body: int
    """All that every token is multiplied with, but for the head."""
    adapters: int
    critic: int
    item_bytes: int
    """Of a weight that is computed with."""
    stored_bytes: int
    """Of a weight in training: under fsdp those are in float32."""
    share: int
    """Processes among which weights are shared out."""
    activation_bytes: float
    """Held a token from forward to backward."""

    @property
    def trained(self) -> int:
        """Parameters of the policy that are trained."""
        return self.adapters or self.whole

    @property
    def state_bytes(self) -> int:
        """Of a trained weight beside itself: AdamW's moments, and a float32 copy where it is not one."""
        return 8 + 4 * (self.stored_bytes < 4)


@dataclass(frozen=True)
class Estimate:
    """The needs of one process of a run."""

    memory: list[Part]
    memory_limit: float
    """Bytes of its device, or its share of the machine."""
    disk: list[Part]
    disk_limit: float
    seconds: dict[str, float]
    """Of one step."""
    steps: int
    lengths: Lengths
    rates: Rates
    setting: str

    @property
    def peak_memory(self) -> float:
        """Bytes, in the phase that needs the most."""
        phases = {part.phase for part in self.memory}
        return max(sum(p.size for p in self.memory if p.phase in ("", phase)) for phase in phases)


def estimate(config: TrainConfig, world_size: int = 1, rates: Rates | None = None) -> Estimate:
    """What `config` needs of each of `world_size` processes. Loads no weights and writes nothing.

    rates: measured here unless given. Raises ConfigError where the policy's shape is not to be found.
    """
    device = resolve_device(config.device)
    cuda = device.startswith("cuda")
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if cuda else "float32"
    shape = measure_shape(config, getattr(torch, dtype), world_size)
    limit = length_limit(config, shape)
    lengths = _seen_lengths(config) or limit
    batch = -(-config.rollout.questions_per_step // world_size) * config.rollout.group_size
    rates = rates or measure_rates(shape, min(batch, config.rollout.max_rows), device)
    memory = memory_parts(config, shape, batch, int(limit.total))
    if cuda:
        memory_limit: float = torch.cuda.get_device_properties(device).total_memory
    else:
        memory_limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / world_size
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        memory.append(Part("the program itself", held))
    out = Path(config.out).absolute()
    return Estimate(
        memory,
        memory_limit,
        disk_parts(config, shape),
        shutil.disk_usage(next(p for p in (out, *out.parents) if p.exists())).free,
        step_seconds(config, shape, lengths, batch, rates),
        config.steps,
        lengths,
        rates,
        f"{dtype} on {device}" + f", each of {world_size} processes" * (world_size > 1),
    )


def measure_shape(config: TrainConfig, dtype: torch.dtype, world_size: int = 1) -> Shape:
    """The policy's numbers, with its adapters, from its configuration alone."""
    try:
        found = AutoConfig.from_pretrained(resolve_policy(config.policy))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"policy = {config.policy!r}: its config.json cannot be read: {reason}") from error
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(found, attn_implementation=_KEEPS)
        whole, trunk = model.num_parameters(), model.base_model.num_parameters()
        add_lora(model, config.lora)
    text, sharded = found.get_text_config(), config.sharding == "fsdp" and world_size > 1
    return Shape(
        config=text,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        whole=whole,
        body=trunk - model.get_input_embeddings().weight.numel(),
        adapters=model.num_parameters() - whole,
        critic=(trunk + text.hidden_size + 1) * config.algorithm.needs_critic,
        item_bytes=dtype.itemsize,
        stored_bytes=4 if sharded else dtype.itemsize,
        share=world_size if sharded else 1,
        activation_bytes=activation_bytes(model.to(dtype).base_model, config.gradient_checkpointing),
    )


def activation_bytes(trunk: Any, recompute: bool) -> float:
    """Bytes a token that a forward and backward pass of a trunk on the meta device holds.

    What autograd saves is counted as it is saved, and once more for one layer: the gradients under way.
    With `recompute` (gradient checkpointing) that is the input of each layer, and all of one.
    """
    tokens, layers = 128, trunk.config.get_text_config().num_hidden_layers
    weights = {parameter.untyped_storage()._cdata for parameter in trunk.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state
    every = sum(storage.nbytes() for storage in saved.values()) / tokens
    return (hidden[0, 0].nbytes * layers + every / layers if recompute else every) + every / layers


def length_limit(config: TrainConfig, shape: Shape) -> Lengths:
    """The longest trajectory that the protocol and the model's positions allow."""
    limits = {key: value for key, value in vars(config.protocol).items() if value is not None}
    named = get_protocol(limits.pop("name", None) or default_protocol(config.policy))
    protocol = replace(named, **limits)
    written = (protocol.max_turns + 1) * protocol.max_response_tokens
    total = min(
        PROMPT_TOKENS + written + protocol.max_turns * protocol.max_observation_tokens,
        protocol.max_context_tokens + protocol.max_response_tokens,
        getattr(shape.config, "max_position_embeddings", None) or 1 << 30,
    )
    return Lengths(min(written, total), total, 1.0, f"at most, by the limits of protocol {protocol.name}")


def _seen_lengths(config: TrainConfig) -> Lengths | None:
    """The means of the last steps of a run that is already in `out`."""
    keys = ("rollout/policy_tokens", "rollout/total_tokens", "rollout/zero_variance_groups")
    rows = [row for row in read_metrics(config.out) if all(row.get(key) is not None for key in keys)][-10:]
    if not rows:
        return None
    written, total, flat = (sum(row[key] for row in rows) / len(rows) for key in keys)
    source = f"as in steps {rows[0]['step']} to {rows[-1]['step']} of {config.out}"
    return Lengths(written, total, 1 - flat, source)


def memory_parts(config: TrainConfig, shape: Shape, batch: int, longest: int) -> list[Part]:
    """Memory of one process that rolls out `batch` trajectories of at most `longest` tokens.

    Under fsdp the trained weights lie in float32, shared out, and the engine has a whole copy of its own.
    """
    text, share, stored = shape.config, shape.share, shape.stored_bytes
    reference = config.algorithm.kl_coefficient > 0 and not config.lora.rank
    tokens = max(longest, min(config.micro_batch_tokens, batch * longest))
    rows = config.rollout.max_rows if config.eval_every else min(batch, config.rollout.max_rows)
    positions = -(-longest // CACHE_BLOCK_TOKENS) * CACHE_BLOCK_TOKENS + 1
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    cached_bytes = 2 * text.num_hidden_layers * heads * shape.head_size * shape.item_bytes  # of a token
    logits = LOGIT_COPIES * 4 * CHUNK_TOKENS * text.vocab_size
    gradients = (
        max(shape.trained, shape.critic) / share
    )  # those of policy and critic are never there together
    parts = [
        Part("policy weights", shape.whole * stored / share),
        Part("adapters", shape.adapters * stored / share),
        Part("the engine's own weights", (share > 1) * shape.whole * shape.item_bytes),
        Part("float32 copies of trained weights", (stored < 4) * 4 * shape.trained),
        Part("AdamW moments", 8 * shape.trained / share),
        Part("reference policy", reference * shape.whole * stored / share),
        Part("critic, its copies and moments", shape.critic * (stored + shape.state_bytes) / share),
        Part(f"KV cache of {rows} rows of {positions:,}", rows * positions * cached_bytes),
        Part("gradients", gradients * stored, "update"),
        Part(f"activations of {tokens:,} tokens", tokens * shape.activation_bytes, "update"),
        Part(f"logits of {CHUNK_TOKENS} tokens", logits, "update"),
        Part("gradients in float32", gradients * 4, "AdamW"),
        Part("temporaries", gradients * 4, "AdamW"),
        Part("all weights in float32 for the engine", (share > 1) * shape.whole * 4, "hand over"),
    ]
    return [part for part in parts if part.size]


def disk_parts(config: TrainConfig, shape: Shape) -> list[Part]:
    """The checkpoints that are there at once: those kept, the best, and one being written."""
    weights = (shape.whole + shape.adapters + shape.critic) * shape.stored_bytes
    one = weights + (shape.trained + shape.critic) * shape.state_bytes
    kept = config.keep_checkpoints + bool(config.eval_every)
    return [Part(f"{kept} checkpoints", kept * one), Part("another while it is written", one)]


def step_seconds(
    config: TrainConfig, shape: Shape, lengths: Lengths, batch: int, rates: Rates
) -> dict[str, float]:
    """Seconds of the parts of a step that rolls out `batch` trajectories in this process.

    A forward costs 2 FLOPs a token and weight, and causal attention 2 T^2 x heads x head size a layer;
    its backward twice that, or once where only adapters are trained.
    """
    algorithm, written, total = config.algorithm, lengths.written, lengths.total
    width = 2 * shape.config.num_hidden_layers * shape.config.num_attention_heads * shape.head_size
    head = 2 * shape.config.hidden_size * shape.config.vocab_size * written
    trunk = 2 * shape.body * total + width * total**2
    near, again = algorithm.kl_coefficient > 0, config.gradient_checkpointing
    before = (algorithm.updates_per_rollout > 1 or (near and algorithm.kl_in == "reward")) + near
    all_fed = algorithm.entropy_coefficient or algorithm.needs_critic or (near and algorithm.kl_in == "loss")
    passes = (2 + (not config.lora.rank) + again) * (1 if all_fed else lengths.fed)
    flops = {
        "reading prompts and observations": (trunk * (1 - written / total), rates.update),
        "writing": (2 * shape.body * written + head + width * total * written, rates.decode),
        "log-probs before the update": (before * (trunk + head), rates.update),
        "update of the policy": (passes * (trunk + head), rates.update),
        "values, and update of the critic": (algorithm.needs_critic * (4 + again) * trunk, rates.update),
    }
    return {name: batch * count / rate for name, (count, rate) in flops.items() if count}


def measure_rates(shape: Shape, rows: int, device: str) -> Rates:
    """FLOPs a second on this machine, `rows` of them at once while decoding; takes about a second."""
    inner = getattr(shape.config, "intermediate_size", None) or 4 * shape.config.hidden_size
    size = shape.config.hidden_size * inner
    # As many matrices as the model has, but no more than it takes to be out of any cache.
    count = max(1, min(shape.body // size, 2**27 // (size * shape.item_bytes)))
    dtype = torch.bfloat16 if shape.item_bytes == 2 else torch.float32
    weights = torch.randn(count, shape.config.hidden_size, inner, device=device, dtype=dtype).unbind()

    def rate(rows: int) -> float:
        left = torch.randn(rows, shape.config.hidden_size, device=device, dtype=dtype)
        begun, rounds = time.perf_counter(), [math.inf]
        while len(rounds) < 4 or time.perf_counter() - begun < 0.3:
            started = time.perf_counter()
            float(sum((left @ weight)[0, 0] for weight in weights))  # waits for the device
            rounds.append(time.perf_counter() - started)
        return 2 * rows * size * count / min(rounds)  # the best: whatever else runs comes and goes

    return Rates(rate(4096 if device.startswith("cuda") else 256), rate(rows))


def estimate_text(config: TrainConfig, world_size: int = 1) -> str:
    """What `sleuth train --dry-run` prints."""
    return render(estimate(config, world_size))


def render(needs: Estimate) -> str:
    """An estimate as a table for a person to read."""
    step, lengths, rates = sum(needs.seconds.values()), needs.lengths, needs.rates
    lines = [
        f"Memory ({needs.setting})",
        *(_line(p.name + f" ({p.phase})" * bool(p.phase), _bytes(p.size)) for p in needs.memory),
        _line("at its peak, of what is there", _of(needs.peak_memory, needs.memory_limit)),
        "Disk",
        *(_line(part.name, _bytes(part.size)) for part in needs.disk),
        _line("in all, of what is free", _of(sum(part.size for part in needs.disk), needs.disk_limit)),
        f"Time of a step ({rates.update / 1e9:,.0f} GFLOP/s, writing {rates.decode / 1e9:,.0f})",
        *(_line(name, _duration(seconds)) for name, seconds in needs.seconds.items()),
        _line("a step", _duration(step)),
        _line(f"all {needs.steps:,} steps", _duration(step * needs.steps)),
        f"Trajectories of {lengths.total:,.0f} tokens, {lengths.written:,.0f} written, {lengths.source}.",
        "Times are of the arithmetic alone. Not counted: searches, evaluations, further sampling rounds.",
    ]
    return "\n".join(lines)


def _line(name: str, value: str) -> str:
    return f"  {name:<50}{value}"


def _of(size: float, limit: float) -> str:
    return f"{_bytes(size)} of {_bytes(limit).strip()}{': TOO MUCH' if size > limit else ''}"


def _bytes(size: float) -> str:
    return f"{size / 1e9:9,.2f} GB" if size >= 1e9 else f"{size / 1e6:9,.2f} MB"


def _duration(seconds: float) -> str:
    unit, name = next((u, n) for u, n in ((3600, "h"), (60, "min"), (1, "s")) if seconds >= 2 * u or u == 1)
    return f"{seconds / unit:9,.2f} {name}"


class _KeepingAttention(torch.autograd.Function):
    """Keeps what a flash kernel keeps for its backward pass, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out


def _keeping_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any):
    return _KeepingAttention.apply(query, key, value).transpose(1, 2).contiguous(), None  # type: ignore


_KEEPS = "sleuth_keeps"
AttentionInterface.register(_KEEPS, _keeping_attention)
