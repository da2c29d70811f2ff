"""The vLLM engine that a configuration asks for: servers joined or started here, weights by a folder."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from agent.engines.servable import Dress, dress
from agent.engines.stopping import eos_ids
from agent.engines.vllm import VLLMEngine
from agent.engines.vllm_process import ServerOptions, ServerProcess, start_servers
from agent.policy import Policy, resolve_policy
from agent.protocol import Protocol
from data.errors import ConfigError

if TYPE_CHECKING:
    from data.settings import EngineConfig

SERVED = "served-policy"
"""Folder of a policy in the dress that started servers load."""


def open_vllm(
    config: EngineConfig, policy: Policy, source: str, protocol: Protocol, max_rows: int, folder: Path | None
) -> VLLMEngine:
    """An engine over the servers of `config.urls`, or over new ones that load the policy from `source`.

    The policy is what weights are written with. max_rows: sequences that a started server decodes at once.
    folder: where logs of started servers go; none: a temporary one. Raises ConfigError.
    """
    if policy.vision is not None:
        raise ConfigError("engine.name = 'vllm': not with a policy that reads pictures; allowed: hf")
    started: list[ServerProcess] = []
    scratch = Path(config.sync_folder or tempfile.mkdtemp(prefix="sleuth-vllm-"))
    if config.urls:
        urls = [url.strip() for url in config.urls.split(",")]
        handed = dress(policy, cpu=False)  # what runs there already is as its owner started it
    else:
        cpu = not torch.cuda.is_available()
        handed = dress(policy, cpu)
        options = server_options(config, handed, source, protocol, max_rows, scratch, cpu)
        started = start_servers(options, config.servers, folder or scratch, _devices(config.devices))
        urls = [server.url for server in started]

    def check() -> None:
        for server in started:
            server.check()

    def stop() -> None:
        for server in started:
            server.stop()
        shutil.rmtree(scratch / SERVED, ignore_errors=True)
        with contextlib.suppress(OSError):  # it may hold logs
            scratch.rmdir()

    ends = eos_ids(policy.model, policy.tokenizer)
    return VLLMEngine(urls, sorted(ends), handed.save, scratch, config.deadline_seconds, check, stop)


def server_options(
    config: EngineConfig,
    handed: Dress,
    source: str,
    protocol: Protocol,
    max_rows: int,
    scratch: Path,
    cpu: bool,
) -> ServerOptions:
    """What servers are told that are started for a policy; one in another dress is written into `scratch`."""
    tokens = context_tokens(handed.policy, protocol)
    return ServerOptions(
        handed.save_policy(scratch / SERVED) if handed.served else resolve_policy(source),
        str(handed.policy.model.dtype).removeprefix("torch."),
        config.python,
        max_rows,
        tokens,
        cpu_arguments(tokens) if cpu else (),
        config.arguments,
    )


def context_tokens(policy: Policy, protocol: Protocol) -> int:
    """The longest that a trajectory can be: what the protocol allows, or what the policy can read."""
    reads = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    return min(reads, protocol.max_context_tokens + protocol.max_response_tokens)


def cpu_arguments(context: int) -> Sequence[str]:
    """What a server without a GPU is told besides.

    Its cache is small, since the trainer beside it needs the memory. A prompt is read whole: vLLM 0.32 dies
    on a CPU (`CPU Generator does not use offset`) where it reads one with a seed in two chunks.
    """
    cache, at_once = str(2 << 30), str(max(4096, context))
    chunks = ("--no-enable-chunked-prefill", "--max-num-batched-tokens", at_once)
    return ("--enforce-eager", "--kv-cache-memory-bytes", cache, *chunks)


def _devices(given: str | None) -> Sequence[str]:
    if given is not None:
        return [device.strip() for device in given.split(",")]
    return [str(device) for device in range(torch.cuda.device_count())]
