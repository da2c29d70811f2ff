"""Estimate what a training run needs, before it starts: memory by part, disk, seconds a step.

Bytes follow from the shapes of the policy, built without its weights on torch's meta device; seconds from
FLOPs over rates measured on this machine. Trajectories are as long as in the run's last steps or in a trial,
else as long as the protocol allows.

The parts' seconds are a floor: real steps on a CPU took 1.5 (100 million parameters) to 3.3 times as long
(one million). Searches, evaluations, more rounds of dynamic sampling and traffic are not in them.
"""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from transformers import AttentionInterface, AutoConfig

from agent.engines.hf import CACHE_BLOCK_TOKENS
from agent.policy import model_class
from agent.policy_folder import find_policy
from agent.protocol import Protocol
from agent.vision import text_trunk
from data.errors import ConfigError
from data.machine.device import choose_dtype, resolve_device
from data.run_dir import read_metrics
from rl.config import TrainConfig
from rl.learner.lora import add_lora

PROMPT_TOKENS = 256
"""Allowed for the instruction and the question."""
LOGITS_HELD = 4 * 256
"""The scorer's chunk of 256 tokens: their logits, log-probs, product for the entropy, and a gradient."""
TRIAL_SECONDS = 60
"""A trial step takes at most about so long if its trajectories are as long as the protocol allows."""
Lengths = tuple[float, float, float]
"""Mean tokens of a trajectory: by the policy, in all; and the share of trajectories that is fed."""
Rates = tuple[float, float]
"""FLOPs a second with the model's matrices: of many tokens, and of one a trajectory (bound by memory)."""


class ResourceEstimate:
    """Memory, disk and time of each of `world_size` processes; counts are of parameters."""

    def __init__(self, config: TrainConfig, world_size: int = 1) -> None:
        """Loads no weights. Raises ConfigError where the policy's shape is not to be found."""
        self.config, self.device = config, resolve_device(config.device)
        self.dtype: torch.dtype = getattr(torch, choose_dtype(config.dtype, self.device))
        try:
            found = AutoConfig.from_pretrained(find_policy(config.policy))
        except (OSError, ValueError) as error:
            why = str(error).strip().splitlines()[0]
            raise ConfigError(f"policy = {config.policy!r}: its config.json cannot be read: {why}") from error
        with torch.device("meta"):
            model: Any = model_class(found).from_config(found, attn_implementation=_META)
            self.whole, trunk = model.num_parameters(), model.base_model.num_parameters()
            add_lora(model, config.lora)
        self.text: Any = found.get_text_config()
        heads = self.text.num_attention_heads
        self.head_size = getattr(self.text, "head_dim", None) or self.text.hidden_size // heads
        self.body = trunk - model.get_input_embeddings().weight.numel()  # all but the head
        self.adapters = model.num_parameters() - self.whole
        self.trained = self.adapters or self.whole
        self.critic = (trunk + self.text.hidden_size + 1) * config.algorithm.needs_critic
        # Under fsdp trained weights lie in float32, shared out; the engine has a whole copy of its own.
        self.share = world_size if config.sharding == "fsdp" else 1
        self.served = not config.engine.shares_model  # by servers, which have memory of their own
        self.stored_bytes = 4 if self.share > 1 else self.dtype.itemsize
        self.copy_bytes = 4 * (self.stored_bytes < 4)  # of the optimiser's own, in float32
        self.trunk = text_trunk(model.to(self.dtype).base_model)
        self.batch = -(-config.rollout.questions_per_step // world_size) * config.rollout.group_size
        self.rows = min(self.batch, config.rollout.max_rows)

    def longest(self, protocol: Protocol) -> Lengths:
        """The longest trajectory that the protocol and the model's positions allow."""
        written = (protocol.max_turns + 1) * protocol.max_response_tokens
        total = min(
            PROMPT_TOKENS + written + protocol.max_turns * protocol.max_observation_tokens,
            protocol.max_context_tokens + protocol.max_response_tokens,
            getattr(self.text, "max_position_embeddings", None) or 1 << 30,
        )
        return min(written, total), total, 1.0

    def memory(self, longest: int) -> dict[str, dict[str, float]]:
        """Bytes by phase and part, with trajectories of `longest` tokens; all but "always" come in turn."""
        config, share, stored = self.config, self.share, self.stored_bytes
        reference = config.algorithm.needs_reference and not self.adapters
        tokens = max(longest, min(config.micro_batch_tokens, self.batch * longest))
        rows = config.rollout.max_rows if config.eval_every else self.rows
        positions = -(-longest // CACHE_BLOCK_TOKENS) * CACHE_BLOCK_TOKENS + 1
        own = not self.served
        gradients = max(self.trained, self.critic) / share  # the policy's are gone when the critic's come
        divided = self.share > 1
        # Servers that read a folder are given one tensor after the other, out of host memory.
        whole_again = divided and (own or config.engine.transport != "folder")
        phases = {
            "always": {
                "policy weights": self.whole * stored / share,
                "adapters": self.adapters * stored / share,
                "the engine's own weights": own * divided * self.whole * self.dtype.itemsize,
                "float32 copies of trained weights": self.copy_bytes * self.trained,
                "AdamW moments": 8 * self.trained / share,
                "reference policy": reference * self.whole * stored / share,
                "critic, its copies and moments": self.critic * (stored + self.copy_bytes + 8) / share,
                f"KV cache of {rows} rows of {positions:,}": own * rows * positions * self.cached_bytes(),
            },
            "update": {
                "gradients": gradients * stored,
                f"activations of {tokens:,} tokens": tokens * self.activation_bytes(),
                "logits of a chunk": 4 * LOGITS_HELD * self.text.vocab_size,
            },
            "AdamW": {"gradients in float32": gradients * 4, "temporaries": gradients * 4},
            "hand over": {"all weights in float32 for the engine": whole_again * self.whole * 4},
        }
        return {phase: {name: n for name, n in parts.items() if n} for phase, parts in phases.items()}

    def cached_bytes(self) -> int:
        """Bytes of a token in a key-value cache."""
        heads = getattr(self.text, "num_key_value_heads", None) or self.text.num_attention_heads
        return 2 * self.text.num_hidden_layers * heads * self.head_size * self.dtype.itemsize

    def server_memory(self, tokens: float) -> dict[str, float]:
        """Bytes of one vLLM server by part, with all its rows `tokens` long; its workspace comes on top."""
        rows = self.config.rollout.max_rows
        cache = rows * tokens * self.cached_bytes()
        parts = {"policy weights": self.whole * self.dtype.itemsize}
        return parts | {f"KV cache of {rows} rows of {tokens:,.0f}": cache}

    def activation_bytes(self) -> float:
        """Bytes a token from forward to backward: what autograd saves, and a layer's gradients."""
        tokens, layers = 128, self.text.num_hidden_layers
        weights = {_storage_id(parameter) for parameter in self.trunk.parameters()}
        saved: dict[int, int] = {}

        def save(tensor: Tensor) -> Tensor:
            known = _storage_id(tensor) in weights
            saved[_storage_id(tensor)] = tensor.untyped_storage().nbytes() * (not known)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
            hidden = self.trunk(input_ids=ids, use_cache=False).last_hidden_state
        every = sum(saved.values()) / tokens
        # Gradient checkpointing keeps the input of each layer, and all of one at a time.
        inputs = hidden[0, 0].nbytes * layers
        return every / layers + (inputs + every / layers if self.config.gradient_checkpointing else every)

    def disk(self) -> dict[str, float]:
        """Bytes of the checkpoints that are there at once: those kept, the best, and one being written."""
        weights = (self.whole + self.adapters + self.critic) * self.stored_bytes
        one = weights + (self.trained + self.critic) * (8 + self.copy_bytes)
        kept = self.config.keep_checkpoints + bool(self.config.eval_every)
        return {f"{kept} checkpoints": kept * one, "another while it is written": one}

    def seconds(self, lengths: Lengths, rates: Rates) -> dict[str, float]:
        """Seconds of the parts of a step. A forward costs 2 FLOPs a token and weight, causal attention
        2 T^2 x heads x head size a layer; its backward twice that, or once where only adapters are trained.
        """
        algorithm, (written, total, fed), (update, decode) = self.config.algorithm, lengths, rates
        width = 2 * self.text.num_hidden_layers * self.text.num_attention_heads * self.head_size
        head = 2 * self.text.hidden_size * self.text.vocab_size * written
        trunk = 2 * self.body * total + width * total**2
        near, again = algorithm.needs_reference, self.config.gradient_checkpointing
        before = (algorithm.updates_per_rollout > 1 or (near and algorithm.kl_in == "reward")) + near
        in_loss = (
            algorithm.entropy_coefficient
            or algorithm.llds_coefficient
            or (near and algorithm.kl_in == "loss")
        )
        fed = 1 if in_loss or algorithm.needs_critic else fed
        flops = {
            "reading prompts and observations": (trunk * (1 - written / total), update),
            "writing": (2 * self.body * written + head + width * total * written, decode),
            "log-probs before the update": (before * (trunk + head), update),
            "update of the policy": ((2 + (not self.adapters) + again) * fed * (trunk + head), update),
            "values, and update of the critic": (algorithm.needs_critic * (4 + again) * trunk, update),
        }
        return {name: self.batch * count / rate for name, (count, rate) in flops.items() if count}

    def trial_questions(self, step_seconds: float) -> int:
        """Return how many of a step's questions take TRIAL_SECONDS, where all of them take `step_seconds`."""
        wanted = self.config.rollout.questions_per_step
        return min(wanted, int(wanted * TRIAL_SECONDS / step_seconds))

    def measure_rates(self) -> Rates:
        """Rates on this machine, a row for each trajectory while decoding; takes about a second."""
        outer = self.text.hidden_size
        inner = getattr(self.text, "intermediate_size", 4 * outer)
        # As many matrices as the model has, but no more than it takes to be out of any cache.
        count = max(1, min(self.body // (outer * inner), 2**27 // (outer * inner * self.dtype.itemsize)))
        there: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        matrices = torch.randn(count, outer, inner, **there).unbind()

        def rate(rows: int) -> float:
            names = {"tokens": torch.randn(rows, outer, **there), "matrices": matrices}
            timer = Timer("for m in matrices: tokens @ m", globals=names, num_threads=torch.get_num_threads())
            best = min(timer.blocked_autorange(min_run_time=0.3).times)  # whatever else runs comes and goes
            return 2 * rows * outer * inner * count / best

        return rate(4096 if self.device.startswith("cuda") else 256), rate(self.rows)


def _storage_id(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def peak(memory: dict[str, dict[str, float]]) -> float:
    """Bytes in the phase that needs the most."""
    always, *others = (sum(parts.values()) for parts in memory.values())
    return always + max(others)


Steps = tuple[Lengths, float, str]
"""Lengths, seconds of a step, and which steps were measured."""


def recent_steps(out: str, last: int = 10) -> Steps | None:
    """Return the lengths and the median seconds of the last steps of the run in `out`; None without any."""
    keys = [f"rollout/{name}" for name in ("policy_tokens", "total_tokens", "zero_variance_groups")]
    keys += ["time/step_seconds", "step"]
    rows = [found for row in read_metrics(out) if None not in (found := [row.get(key) for key in keys])]
    if not rows:
        return None
    written, total, flat, seconds, steps = zip(*rows[-last:], strict=True)
    lengths = fmean(written), fmean(total), 1 - fmean(flat)
    return lengths, median(seconds), f"as in steps {steps[0]} to {steps[-1]}"


def estimate_text(
    config: TrainConfig,
    protocol: Protocol,
    world_size: int = 1,
    measure: Callable[[int], Steps | None] | None = None,
) -> str:
    """Return the text of `sleuth train --dry-run`.

    measure: takes real steps over so many questions, where the run in `config.out` has taken none.
    """
    needs = ResourceEstimate(config, world_size)
    program_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    limit, rates = needs.longest(protocol), needs.measure_rates()
    found = recent_steps(config.out)
    if measure and not found:
        questions = needs.trial_questions(sum(needs.seconds(limit, rates).values()))
        found = measure(questions) if questions else None
    bound = (limit, 0.0, f"at most, by the limits of protocol {protocol.name}")
    lengths, measured, source = found or bound
    memory, disk, seconds = needs.memory(int(limit[1])), needs.disk(), needs.seconds(lengths, rates)
    if needs.device.startswith("cuda"):
        room: float = torch.cuda.get_device_properties(needs.device).total_memory
    else:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / world_size
        memory["always"]["the program itself"] = program_bytes
    out = Path(config.out).absolute()
    free = shutil.disk_usage(next(p for p in (out, *out.parents) if p.exists())).free
    step = measured or sum(seconds.values())
    seconds["a step, " + ("measured" if measured else "if so long, at least")] = step
    parts = {f"{phase}: {name}": size for phase, of in memory.items() for name, size in of.items()}
    server = needs.server_memory(limit[1]) if needs.served else {}
    lines = [
        *_table(f"Memory of each of {world_size} ({needs.dtype}, {needs.device})", parts, peak(memory), room),
        *(_table("Memory of each vLLM server", server, sum(server.values())) if server else ()),
        *_table("Disk", disk, sum(disk.values()), free),
        f"Time, with {lengths[1]:,.0f} tokens a trajectory, {lengths[0]:,.0f} written ({source})",
        *(f"  {name:<50}{value:11,.2f} s" for name, value in seconds.items()),
        f"  {f'all {config.steps:,} steps':<50}{step * config.steps / 3600:11,.2f} h",
        f"Parts at least: their arithmetic at {rates[0] / 1e9:,.0f} GFLOP/s, {rates[1] / 1e9:,.0f} writing.",
        "On a CPU real steps took 1.5 to 3.3 times as long; searches and evaluations come on top.",
    ]
    return "\n".join(lines)


def _table(title: str, parts: dict[str, float], total: float, room: float | None = None) -> list[str]:
    rows = [f"  {name:<50}{size / 1e6:11,.1f} MB" for name, size in (parts | {"at once": total}).items()]
    of = "" if room is None else f" of {room / 1e6:,.0f}{': TOO MUCH' * (total > room)}"
    return [title, *rows[:-1], rows[-1] + of]


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any):
    """Keeps what a flash kernel keeps for its backward pass; on the meta device it computes nothing."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(query, key, value)[0].transpose(1, 2), None


_META = "sleuth_meta"
AttentionInterface.register(_META, _attend)
