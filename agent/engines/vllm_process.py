"""vLLM servers: processes of another environment's Python, their options, command and environment."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.errors import ConfigError
from retriever_server.client.pool import Server
from retriever_server.client.server_process import Place, ServerProcess

WORKER = Path(__file__).parent / "worker"
STOP_SECONDS = 15


@dataclass(frozen=True)
class ServerOptions:
    """Options of all servers that are started."""

    model: str
    dtype: str
    python: str = ".venv-vllm/bin/python"
    max_sequences: int = 128
    context_tokens: int = 4096
    usual: Sequence[str] = ()
    """Arguments of ours that depend on the machine."""
    arguments: str = ""
    """Arguments of the user; they win."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that it sees besides ours."""


def find_python(name: str) -> str:
    """The Python of the environment that vLLM lives in; ConfigError where there is none."""
    found = shutil.which(name)
    if found is None:
        raise ConfigError(f"engine.python = {name!r}: no such program; `bash scripts/vllm_env.sh` makes it")
    return found


def start_servers(
    options: ServerOptions, count: int, folder: Path, devices: Sequence[str] = ()
) -> list[Server]:
    """Start so many, the devices dealt out evenly; they load at the same time. folder: of their logs."""
    python = find_python(options.python)
    folder.mkdir(parents=True, exist_ok=True)
    servers = []
    for number in range(count):
        process = ServerProcess(
            f"vllm-{number}",
            Place(grace_seconds=STOP_SECONDS),
            lambda host, port: server_command(python, options, port, host),
            server_environment(",".join(devices[number::count]) or None, options.environment),
            folder / f"vllm-{number}.log",
        )
        servers.append(Server(process.restart(), process))
    return servers


def server_command(python: str, options: ServerOptions, port: int, host: str = "127.0.0.1") -> list[str]:
    """The command of one server, which listens on `host` and `port`."""
    given = {
        "--model": options.model,
        "--host": host,
        "--port": str(port),
        "--dtype": options.dtype,
        "--max-num-seqs": str(options.max_sequences),
        "--max-model-len": str(options.context_tokens),
        "--logprobs-mode": "processed_logprobs",  # of the distribution that was sampled from
        "--worker-extension-cls": "sleuth_worker.Reload",
    }
    pairs = [word for pair in given.items() for word in pair]
    return [
        # `vllm serve` asks for a distribution called vllm, which the one for CPUs is not.
        *(python, "-m", "vllm.entrypoints.openai.api_server", *pairs),
        *("--enable-prefix-caching", "--enable-scale-out", *options.usual),
        *shlex.split(options.arguments),
    ]


def server_environment(device: str | None, more: Mapping[str, str] | None = None) -> Mapping[str, str | None]:
    """Return what a server finds in its environment besides ours; None: not there. device: those it sees."""
    return {
        **{"WORLD_SIZE": None, "RANK": None},
        # Its own folder and no more: our packages are of another environment.
        **{"PYTHONPATH": str(WORKER), "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"},
        **(more or {}),
        **({"CUDA_VISIBLE_DEVICES": device} if device else {}),
    }
