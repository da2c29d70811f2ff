"""The vLLM engine that a configuration asks for: servers joined or started here, weights by a folder."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from agent.engines.stopping import eos_ids
from agent.engines.vllm import VLLMEngine
from agent.engines.vllm_process import ServerOptions, ServerProcess, start_servers
from agent.policy import Policy, resolve_policy
from agent.protocol import Protocol
from data.errors import ConfigError

if TYPE_CHECKING:
    from data.settings import EngineConfig

CPU_ARGUMENTS = ("--enforce-eager", "--kv-cache-memory-bytes", str(2 << 30))
"""Else vLLM takes most of the memory, which the trainer beside it needs."""


def open_vllm(
    config: EngineConfig, policy: Policy, source: str, protocol: Protocol, max_rows: int, folder: Path | None
) -> VLLMEngine:
    """An engine over the servers of `config.urls`, or over new ones that load the policy from `source`.

    The policy is what weights are written with. max_rows: sequences that a started server decodes at once.
    folder: where logs of started servers go; none: a temporary one. Raises ConfigError.
    """
    if policy.vision is not None:
        raise ConfigError("engine.name = 'vllm': not with a policy that reads pictures; allowed: hf")
    _check_heads(policy)
    started: list[ServerProcess] = []
    scratch = Path(config.sync_folder or tempfile.mkdtemp(prefix="sleuth-vllm-"))
    if config.urls:
        urls = [url.strip() for url in config.urls.split(",")]
    else:
        options = ServerOptions(
            resolve_policy(source),
            str(policy.model.dtype).removeprefix("torch."),
            config.python,
            max_rows,
            context_tokens(policy, protocol),
            () if torch.cuda.is_available() else CPU_ARGUMENTS,
            config.arguments,
        )
        started = start_servers(options, config.servers, folder or scratch, _devices(config.devices))
        urls = [server.url for server in started]

    def write(target: Path, state: dict[str, Tensor] | None) -> None:
        policy.model.save_pretrained(target, state_dict=state)

    def check() -> None:
        for server in started:
            server.check()

    def stop() -> None:
        for server in started:
            server.stop()
        with contextlib.suppress(OSError):  # it may hold logs
            scratch.rmdir()

    ends = eos_ids(policy.model, policy.tokenizer)
    return VLLMEngine(urls, sorted(ends), write, scratch, config.deadline_seconds, check, stop)


def _check_heads(policy: Policy) -> None:
    """vLLM's Qwen2 does not read `head_dim`: it would load such a policy without a word, and wrongly."""
    config = policy.model.config
    usual = config.hidden_size // config.num_attention_heads
    size = getattr(config, "head_dim", None) or usual
    if config.model_type == "qwen2" and size != usual:
        raise ConfigError(
            f"engine.name = 'vllm': vLLM takes a Qwen2's heads to be hidden_size / heads = {usual} wide, "
            f"this policy's are {size}; allowed: hf"
        )


def context_tokens(policy: Policy, protocol: Protocol) -> int:
    """The longest that a trajectory can be: what the protocol allows, or what the policy can read."""
    reads = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    return min(reads, protocol.max_context_tokens + protocol.max_response_tokens)


def _devices(given: str | None) -> Sequence[str]:
    if given is not None:
        return [device.strip() for device in given.split(",")]
    return [str(device) for device in range(torch.cuda.device_count())]
