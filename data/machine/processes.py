"""Work in several processes that end with the one that reads what they have done."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Generator, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from data.errors import RunStopped, SleuthError


class Job(Protocol):
    """Work that can be shared out; goes to the processes by pickle."""

    def share(self, first: int, step: int) -> Iterator[Any]:
        """Do every `step`-th piece from `first` on; yields what the reader is told of each."""
        ...


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(job: Job, count: int, doing: str) -> Generator[Any, None, None]:
    """Yield what so many processes tell, as it comes; close it, and they end. One is this process.

    Raises the SleuthError of a process, and RunStopped where one was killed.   doing: "drawing"
    """
    if count == 1:
        yield from job.share(0, 1)
        return
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    workers = [
        context.Process(target=_do_share, args=(job, number, count, sender), daemon=True)
        for number, (_, sender) in enumerate(pipes)
    ]
    try:
        for worker, (_, sender) in zip(workers, pipes, strict=True):
            worker.start()
            sender.close()  # so that the end of the worker is the end of its pipe
        open_pipes = [receiver for receiver, _ in pipes]
        while open_pipes:
            ready = wait(open_pipes)
            for receiver in [each for each in open_pipes if each in ready]:
                message = _receive(receiver, doing)
                if isinstance(message, SleuthError):
                    raise message
                if message is None:
                    open_pipes.remove(receiver)
                else:
                    yield message
    finally:
        started = [worker for worker in workers if worker.pid]
        for worker in started:
            worker.terminate()
        for worker in started:
            worker.join()


def _receive(receiver: Connection, doing: str) -> Any:
    try:
        return receiver.recv()
    except (EOFError, OSError) as error:
        what = f"a {doing} process was killed (is there too little memory?)"
        raise RunStopped(f"{what}; what it has done is there: the same command goes on") from error


def _do_share(job: Job, number: int, count: int, sender: Connection) -> None:
    """Send what is told of each piece, then None. Its reader gone, sending fails, which ends it."""
    with suppress(BrokenPipeError, KeyboardInterrupt):
        try:
            for message in job.share(number, count):
                sender.send(message)
            sender.send(None)
        except SleuthError as error:
            sender.send(error)
