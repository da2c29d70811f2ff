"""Open the vLLM engine of a configuration: servers joined or started, and a transport for weights."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from agent.engines.sampling import eos_ids
from agent.engines.transport import AdapterTransport, FolderTransport, Transport
from agent.engines.vllm import VLLMEngine
from agent.engines.vllm_process import VARIABLES, server_command, start_servers
from agent.engines.weight_export import WeightExport, export_for_vllm
from agent.policy_folder import find_policy
from agent.protocol import Protocol
from data.errors import ConfigError
from retriever_server.client.pool import servers_at
from retriever_server.client.server_process import Command

if TYPE_CHECKING:
    from agent.engines.config import EngineConfig
    from agent.policy import Policy

SERVED = "served-policy"
"""Folder of a policy as started servers load it, where it is exported as another model."""
MAX_LORA_RANK = 64
"""Highest rank of adapters that a started server takes, unless `engine.arguments` says otherwise."""


def open_vllm(
    config: EngineConfig, policy: Policy, source: str, protocol: Protocol, max_rows: int, folder: Path | None
) -> VLLMEngine:
    """An engine over the servers of `config.urls`, or over new ones that load the policy from `source`.

    The policy is what weights are written with. max_rows: sequences that a started server decodes at once.
    folder: where logs of started servers go; none: a temporary one. Raises ConfigError.
    """
    if policy.vision is not None:
        raise ConfigError("engine.name = 'vllm': not with a policy that reads pictures; allowed: hf")
    ends = sorted(eos_ids(policy.model, policy.tokenizer))
    scratch = Path(config.sync_folder or tempfile.mkdtemp(prefix="sleuth-vllm-"))
    # What runs at `urls` already is as its owner started it.
    cpu = config.urls is None and not torch.cuda.is_available()
    export = export_for_vllm(policy, cpu)
    transport = open_transport(config, export, scratch)
    if config.urls:
        servers = servers_at([url.strip() for url in config.urls.split(",")], "engine.urls")
    else:
        planned = plan_command(config, export, source, protocol, max_rows, scratch, cpu)
        servers = start_servers(*planned, config.servers, folder or scratch, _devices(config.devices))
    limits = (config.deadline_seconds, config.max_restarts)
    return VLLMEngine(servers, ends, transport, *limits, on_close=lambda: _remove(scratch))


def _remove(scratch: Path) -> None:
    shutil.rmtree(scratch / SERVED, ignore_errors=True)
    with contextlib.suppress(OSError):  # it may hold logs
        scratch.rmdir()


def open_transport(config: EngineConfig, export: WeightExport, folder: Path) -> Transport:
    """Return the transport of new weights to the servers. Raises ConfigError where there is no GPU for it."""
    if config.lora == "adapter":
        return AdapterTransport(export.save_adapter, folder)
    if config.transport == "folder":
        return FolderTransport(export.save, folder)
    from agent.engines.device_transport import IPCTransport, NCCLTransport, device_arguments

    device_arguments(config.transport)

    def tensors(state: dict[str, Tensor] | None) -> dict[str, Tensor]:
        return export.weights(state or export.policy.model.state_dict())

    return {"nccl": NCCLTransport, "ipc": IPCTransport}[config.transport](tensors)


def plan_command(
    config: EngineConfig,
    export: WeightExport,
    source: str,
    protocol: Protocol,
    max_rows: int,
    scratch: Path,
    cpu: bool,
) -> tuple[Command, Mapping[str, str | None]]:
    """Return command and environment of servers for a policy; one that is exported goes into `scratch`."""
    tokens = context_tokens(export.policy, protocol)
    usual, environment = [*cpu_arguments(tokens)] if cpu else [], dict(VARIABLES)
    if config.lora == "adapter":
        usual += ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(MAX_LORA_RANK)]
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    elif config.transport != "folder":
        from agent.engines.device_transport import device_arguments

        arguments, more = device_arguments(config.transport)
        usual, environment = usual + arguments, environment | more
    model = export.save_policy(scratch / SERVED) if export.served else find_policy(source)
    dtype = str(export.policy.model.dtype).removeprefix("torch.")
    usual += shlex.split(config.arguments)
    return server_command(config.python, model, dtype, max_rows, tokens, usual), environment


def plan_server(
    config: EngineConfig,
    source: str,
    dtype: str,
    protocol: Protocol,
    max_rows: int,
    scratch: Path,
    on_gpus: bool,
) -> tuple[Command, Mapping[str, str | None]]:
    """Command and environment of a server that another process starts.

    The policy is loaded once, on this CPU, to see what it is. scratch: see `plan_command`.
    """
    from agent.policy import load_policy

    dtype = "bfloat16" if dtype == "auto" and on_gpus else dtype
    export = export_for_vllm(load_policy(source, "cpu", dtype), cpu=False)  # as the trainers do, who join
    return plan_command(config, export, source, protocol, max_rows, scratch, not on_gpus)


def context_tokens(policy: Policy, protocol: Protocol) -> int:
    """The longest that a trajectory can be: what the protocol allows, or what the policy can read."""
    reads = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    return min(reads, protocol.max_context_tokens + protocol.max_response_tokens)


def cpu_arguments(context: int) -> Sequence[str]:
    """Return further arguments of a server without a GPU.

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
