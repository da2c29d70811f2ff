"""Processes that serve one socket: replaced when they die or hang, given up when that is of no use."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from data.errors import SleuthError
from retriever_server.server.metrics import forget_process

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.2
_EARLY_SECONDS, _MOST_EARLY_DEATHS = 30.0, 5
"""A worker that dies so soon after its start, so often in a row, will not live."""
_END_SECONDS = 2.0
"""For those that never served, or have had their time to stop."""

Work = Callable[[Any, socket.socket, "Pulse"], None]


class WorkersFailed(SleuthError):
    """The workers of a server cannot serve."""


class Pulse:
    """Reports of a worker to the process that watches it: that it is well, or why it cannot serve."""

    def __init__(self, context: Any) -> None:
        self._beat = context.Value("d", 0.0, lock=False)  # nobody waits for the other
        self._heard, self._said = context.Pipe(duplex=False)

    def beat(self) -> None:
        """Report that this worker is well."""
        self._beat.value = time.monotonic()

    def complain(self, reason: str) -> None:
        """Report why this worker cannot serve."""
        self._said.send(reason)

    @property
    def last(self) -> float:
        """Time of the last beat, 0 before the first."""
        return self._beat.value

    def complaint(self) -> str:
        """Return the report of why it cannot serve, or ""."""
        return self._heard.recv() if self._heard.poll() else ""


def begin_work(open_app: Callable[[], Any], pulse: Pulse) -> Any:
    """Return the application of a worker, which does not outlive its parent; end here if it does not open."""
    for early in (signal.SIGINT, signal.SIGHUP):
        signal.signal(early, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()
    try:
        return open_app()
    except Exception as error:
        pulse.complain(f"{'' if isinstance(error, SleuthError) else f'{type(error).__name__}: '}{error}")
        os._exit(1)


class _Worker:
    """One worker: its process, which is replaced when it dies, and how often it died early."""

    def __init__(self) -> None:
        self.early_deaths, self.begun = 0, 0.0
        self.process: Any = None
        self.pulse: Any = None

    def age(self) -> float:
        """Seconds since it began to serve, or to start."""
        return time.monotonic() - self.begun

    def silence(self) -> float:
        """Seconds since it was well."""
        return time.monotonic() - (self.pulse.last or self.begun)

    def how_it_ended(self) -> str:
        code = self.process.exitcode
        return self.pulse.complaint() or (
            f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        )


class Workers:
    """`count` processes that each run `work(settings, listener, pulse)`.

    start_seconds: for one to serve; silent_seconds: for one that serves to be well again; stop_seconds: for
    one that is told to stop.
    """

    def __init__(
        self,
        count: int,
        work: Work,
        settings: Any,
        start_seconds: float,
        silent_seconds: float,
        stop_seconds: float,
    ) -> None:
        self._work, self._settings = work, settings
        self._start_seconds, self._silent_seconds = start_seconds, silent_seconds
        self._stop_seconds = stop_seconds
        self._context = multiprocessing.get_context("spawn")
        self._workers = [_Worker() for _ in range(count)]
        self._stopping = threading.Event()

    def run(self, listener: socket.socket, ready: Callable[[], object]) -> None:
        """Serve until SIGTERM or SIGINT; `ready` is called once all do. SIGHUP is passed on.

        Raises WorkersFailed where one cannot serve at the start, or dies again and again.
        """
        for stop in (signal.SIGTERM, signal.SIGINT):
            signal.signal(stop, lambda *_: self._stopping.set())
        signal.signal(signal.SIGHUP, lambda *_: self._tell_all(signal.SIGHUP))
        try:
            for worker in self._workers:
                self._start(worker, listener)
            if self._wait_until_all_serve():
                ready()
            while not self._stopping.is_set():
                self._wait()
                for worker in self._workers:
                    self._mind(worker, listener)
        except BaseException:
            self._end(_END_SECONDS)
            raise
        listener.close()  # the workers have it; once they close it, nobody listens
        self._end(self._stop_seconds)

    def _start(self, worker: _Worker, listener: socket.socket) -> None:
        worker.pulse, worker.begun = Pulse(self._context), time.monotonic()
        arguments = (self._settings, listener, worker.pulse)
        worker.process = self._context.Process(target=self._work, args=arguments)
        worker.process.start()

    def _wait(self) -> None:
        multiprocessing.connection.wait([each.process.sentinel for each in self._workers], _LOOK_SECONDS)

    def _wait_until_all_serve(self) -> bool:
        """Return False if it is told to stop before."""
        while not self._stopping.is_set():
            self._wait()
            for worker in self._workers:
                if worker.process.exitcode is not None:
                    raise WorkersFailed(f"a worker cannot serve: {worker.how_it_ended()}")
                if not worker.pulse.last and worker.age() > self._start_seconds:
                    raise WorkersFailed(f"a worker does not serve after {self._start_seconds:.0f} s")
            if all(worker.pulse.last for worker in self._workers):
                return True
        return False

    def _mind(self, worker: _Worker, listener: socket.socket) -> None:
        """Replace it if it is dead, or has not been well for too long."""
        patience = self._silent_seconds if worker.pulse.last else self._start_seconds
        if worker.process.exitcode is None:
            if worker.silence() < patience:
                return
            _log.error("worker %d has not been well for %.0f s", worker.process.pid, patience)
            worker.process.kill()
            worker.process.join()
        if self._stopping.is_set():
            return
        forget_process(worker.process.pid or 0)
        worker.early_deaths = worker.early_deaths + 1 if worker.age() < _EARLY_SECONDS else 0
        how = worker.how_it_ended()
        if worker.early_deaths >= _MOST_EARLY_DEATHS:
            raise WorkersFailed(f"a worker died {worker.early_deaths} times in a row, at last {how}")
        _log.error("worker %d: %s; another takes its place", worker.process.pid, how)
        self._start(worker, listener)

    def _tell_all(self, signal_number: int) -> None:
        for worker in self._workers:
            if worker.process is not None and worker.process.exitcode is None:
                os.kill(worker.process.pid, signal_number)

    def _end(self, seconds: float) -> None:
        """Stop all; those that do not within so many seconds are killed, those that never served sooner."""
        self._tell_all(signal.SIGTERM)
        until = time.monotonic() + seconds
        for worker in self._workers:
            if worker.process is None:
                continue
            worker.process.join(max(0.0, until - time.monotonic()) if worker.pulse.last else _END_SECONDS)
            worker.process.kill()
            worker.process.join()
