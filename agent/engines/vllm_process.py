"""vLLM servers started here: processes of another environment's Python, which end when we do.

One that dies, or answers no more, is started again on its port; its log goes on in the same file.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.errors import ConfigError, EngineError
from data.managed_process import ManagedProcess

logger = logging.getLogger(__name__)

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


class ServerProcess:
    """One server: running from the start on, not answering before it has loaded."""

    def __init__(self, options: ServerOptions, log: Path, device: str | None = None) -> None:
        """log: where all that it prints goes. device: the CUDA devices it sees; none: ours."""
        python = find_python(options.python)
        port = _free_port()
        self.log, self.url = log, f"http://127.0.0.1:{port}"
        self.restarts = 0
        self._command = server_command(python, options, port)
        self._environment = server_environment(device, options.environment)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
        self._launch()

    def _launch(self) -> None:
        self.child = ManagedProcess(self._command, self.log, self._environment, grace_seconds=STOP_SECONDS)

    def check(self) -> None:
        """Raise EngineError, with the last line that it printed, if it has ended."""
        if self.child.status is not None:
            said = self.child.last_words()
            raise EngineError(f"engine vllm: the server has ended: {said} (see {self.log})")

    def restart(self) -> None:
        """Start it again, on the same port and device; what is left of it is killed."""
        self.child.kill()
        self.restarts += 1
        with self.log.open("a") as out:
            out.write(f"--- started again ({self.restarts}) ---\n")
        self._launch()


class StartedServers:
    """The servers of one engine that were started here."""

    def __init__(
        self,
        options: ServerOptions,
        count: int,
        folder: Path,
        devices: Sequence[str] = (),
        max_restarts: int = 3,
        patience_seconds: float = 600.0,
    ) -> None:
        """Start so many, the devices dealt out evenly; they load at the same time.

        folder: of their logs. max_restarts: of each of them; patience_seconds: a server that runs, but has
        not answered for so long, is killed.
        """
        self.max_restarts, self.patience_seconds = max_restarts, patience_seconds
        self.servers: list[ServerProcess] = []
        self._lock = threading.Lock()
        self._closed = False
        try:
            for number in range(count):
                share = ",".join(devices[number::count]) or None
                self.servers.append(ServerProcess(options, folder / f"vllm-{number}.log", share))
        except BaseException:
            self.stop()
            raise

    def check(self) -> None:
        """Raise EngineError if one has ended."""
        for server in self.servers:
            server.check()

    def revive(self, url: str, out_seconds: float) -> bool:
        """Start the server of that URL again if it has ended, or hangs; whether it may yet answer."""
        with self._lock:
            [server] = [server for server in self.servers if server.url == url]
            if self._closed:
                return False
            seconds = server.child.seconds
            if seconds is None:
                why = f"has ended: {server.child.last_words()}"
            elif min(seconds, out_seconds) > self.patience_seconds:
                why = f"has not answered for {out_seconds:.0f} s"
            else:
                return True
            if server.restarts >= self.max_restarts:
                logger.warning("engine vllm: %s %s; it was started again %d times", url, why, server.restarts)
                return False
            logger.warning("engine vllm: %s %s; it is started again (see %s)", url, why, server.log)
            server.restart()
            return True

    def stop(self) -> None:
        """End all, side by side."""
        with self._lock:
            self._closed = True
        stops = [threading.Thread(target=server.child.stop, args=[STOP_SECONDS]) for server in self.servers]
        for each in stops:
            each.start()
        for each in stops:
            each.join()


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


def server_environment(device: str | None, more: Mapping[str, str] | None = None) -> Mapping[str, str]:
    """Return the environment of a server: that of this process, and variables of ours."""
    environment = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK")}
    # Its own folder and no more: our packages are of another environment.
    environment |= {"PYTHONPATH": str(WORKER), "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return environment | dict(more or {}) | ({"CUDA_VISIBLE_DEVICES": device} if device else {})


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
