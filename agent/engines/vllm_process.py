"""vLLM servers: processes of another environment's Python, their options, command and environment."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from data.errors import ConfigError
from retriever_server.client.pool import Server
from retriever_server.client.server_process import Command, Place, ServerProcess

WORKER = Path(__file__).parent / "worker"
STOP_SECONDS = 15


VARIABLES: Mapping[str, str | None] = {
    **{"WORLD_SIZE": None, "RANK": None},
    # Its own folder and no more: our packages are of another environment.
    **{"PYTHONPATH": str(WORKER), "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"},
}
"""Variables that a server finds in its environment besides ours; None: not there."""


def find_python(name: str) -> str:
    """The Python of the environment that vLLM lives in; ConfigError where there is none."""
    found = shutil.which(name)
    if found is None:
        raise ConfigError(f"engine.python = {name!r}: no such program; `bash scripts/vllm_env.sh` makes it")
    return found


def start_servers(
    command: Command,
    environment: Mapping[str, str | None],
    count: int,
    folder: Path,
    devices: Sequence[str] = (),
) -> list[Server]:
    """Start so many, the devices dealt out evenly; they load at the same time. folder: of their logs."""
    folder.mkdir(parents=True, exist_ok=True)
    servers = []
    for number in range(count):
        name, mine = f"vllm-{number}", ",".join(devices[number::count])
        seen = {"CUDA_VISIBLE_DEVICES": mine} if mine else {}
        place, log = Place(grace_seconds=STOP_SECONDS), folder / f"{name}.log"
        process = ServerProcess(name, place, command, {**environment, **seen}, log)
        servers.append(Server(process.restart(), process))
    return servers


def server_command(
    python: str,
    model: str,
    dtype: str,
    max_sequences: int = 128,
    context_tokens: int = 4096,
    arguments: Sequence[str] = (),
) -> Command:
    """Return the command of a server. python: that of vLLM's environment; arguments: those after ours win."""
    python = find_python(python)

    def command(host: str, port: int) -> list[str]:
        given = {
            "--model": model,
            "--host": host,
            "--port": str(port),
            "--dtype": dtype,
            "--max-num-seqs": str(max_sequences),
            "--max-model-len": str(context_tokens),
            "--logprobs-mode": "processed_logprobs",  # of the distribution that was sampled from
            "--worker-extension-cls": "sleuth_worker.Reload",
        }
        pairs = [word for pair in given.items() for word in pair]
        # `vllm serve` asks for a distribution called vllm, which the one for CPUs is not.
        program = [python, "-m", "vllm.entrypoints.openai.api_server"]
        return [*program, *pairs, "--enable-prefix-caching", "--enable-scale-out", *arguments]

    return command
