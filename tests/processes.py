"""Processes forked from one that has imported what they need, so that a test does not pay for their start.

They are of the interpreter and the libraries that a new process would have, and end as it would; only what
happens before `main` is not theirs. Where that matters, tests start `python -m scripts` by subprocess.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from scripts.__main__ import main

ROOT = Path(__file__).parents[1]
PATIENCE_SECONDS = 60
LOADED = [
    "rl.trainer",
    "scripts.wiring",
    "transformers.models.qwen2.modeling_qwen2",
    "fastapi",
    "uvicorn",
    "tests.frozen",
]
"""Nothing whose import reads the environment of a test: prometheus_client is to come later."""
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(LOADED)


class Forked:
    """A process that calls a function of a module; in use like a subprocess.Popen of text pipes."""

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        """`environment` is added to ours; `log` gets what it writes to stderr, which else is a pipe."""
        (out, out_end), (err, err_end) = _server.Pipe(False), _server.Pipe(False)
        begin = function, arguments, {**os.environ, **(environment or {})}, out_end, log or err_end
        self._process = _server.Process(target=_call, args=begin, daemon=False)
        self._process.start()
        out_end.close()
        err_end.close()
        self.stdout, self.stderr = _readable(out), _readable(err)
        self.pid: int = self._process.pid  # type: ignore[assignment]

    @property
    def returncode(self) -> int | None:
        """The exit status; negative: the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status; a subprocess.TimeoutExpired if it has none in time."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that it writes until it ends."""
        self.wait(timeout)
        return self.stdout.read(), self.stderr.read()

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it, if it still runs, and its pipes."""
        self.kill()
        self.wait(PATIENCE_SECONDS)
        self.stdout.close()
        self.stderr.close()


def sleuth(*words: object, **options: Any) -> Forked:
    """A process of `sleuth WORDS`."""
    return Forked(_exit_with, [str(word) for word in words], **options)


def _exit_with(argv: list[str]) -> None:
    sys.exit(main(argv))


def _readable(connection: Any) -> IO[str]:
    """The end of a pipe as a file."""
    file = os.fdopen(os.dup(connection.fileno()), encoding="utf-8")
    connection.close()
    return file


def _call(
    function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], out: Any, err: Any
) -> None:
    """Take the place of a new process: streams, folder, environment; then call."""
    multiprocessing.process._parent_process = None  # type: ignore[attr-defined]  # nobody's worker
    for number, stream in ((1, out), (2, err)):
        if isinstance(stream, Path):
            stream = stream.open("a")
        os.dup2(stream.fileno(), number)
        stream.close()
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    try:
        function(*arguments)
    finally:
        atexit._run_exitfuncs()
