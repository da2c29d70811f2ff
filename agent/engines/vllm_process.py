"""vLLM servers started here: processes of another environment's Python, which end when we do."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.errors import ConfigError, EngineError

WORKER = Path(__file__).parent / "worker"
# A shell that waits for the end of its input, which comes when this process ends, however it ends; and
# that ends when the server does.
WATCHED = '("$@" </dev/null; kill -TERM $$) & read -r _; kill -TERM 0'
STOP_SECONDS = 15.0


@dataclass(frozen=True)
class ServerOptions:
    """What all started servers are told."""

    model: str
    dtype: str
    python: str = ".venv-vllm/bin/python"
    max_sequences: int = 128
    context_tokens: int = 4096
    usual: Sequence[str] = ()
    """Arguments of ours that depend on the machine."""
    arguments: str = ""
    """Of the user's; they win."""


class ServerProcess:
    """One server: running from the start on, not answering before it has loaded."""

    def __init__(self, options: ServerOptions, log: Path, device: str | None = None) -> None:
        """log: where all that it prints goes. device: the CUDA devices it sees; none: ours."""
        python = shutil.which(options.python)
        if python is None:
            raise ConfigError(
                f"engine.python = {options.python!r}: no such program; `bash scripts/vllm_env.sh` makes it"
            )
        self.log, port = log, _free_port()
        self.url = f"http://127.0.0.1:{port}"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                ["sh", "-c", WATCHED, "sh", *server_command(python, options, port)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=server_environment(device),
                start_new_session=True,
            )

    def check(self) -> None:
        """Raise EngineError, with the last line that it printed, if it has ended."""
        if self._process.poll() is not None:
            raise EngineError(f"engine vllm: the server has ended: {_last_words(self.log)} (see {self.log})")

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """End it; returns when it has ended."""
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self.kill()  # what it started may outlive it

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def start_servers(
    options: ServerOptions, count: int, folder: Path, devices: Sequence[str] = ()
) -> list[ServerProcess]:
    """Start so many servers, the devices dealt out evenly; they load at the same time."""
    shares = [",".join(devices[i::count]) or None for i in range(count)]
    started: list[ServerProcess] = []
    try:
        for number, share in enumerate(shares):
            started.append(ServerProcess(options, folder / f"vllm-{number}.log", share))
    except BaseException:
        for server in started:
            server.kill()
        raise
    return started


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


def server_environment(device: str | None) -> Mapping[str, str]:
    """What a server sees of this process's environment."""
    environment = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK")}
    # Its own folder and no more: our packages are of another environment.
    environment |= {"PYTHONPATH": str(WORKER), "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return environment | ({"CUDA_VISIBLE_DEVICES": device} if device else {})


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if "Error" in line] or lines or ["it printed nothing"]
    return said[-1][-300:]
