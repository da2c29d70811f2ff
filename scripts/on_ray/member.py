"""The processes of a run as their launcher sees them: each at a place of the cluster, started again there.

A `Service` (an engine, a replica of the retriever) is looked after by a thread of its own. All waits end: at
a deadline, or when the process, its actor or its machine is lost, which is a `Lost` with the reason.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from scripts.on_ray.place import Place

logger = logging.getLogger(__name__)

PLACE_SECONDS = 60.0
"""The longest wait for an actor that is there to answer."""
LOOK_EVERY_SECONDS = 1.0
HEALTH_TIMEOUT_SECONDS = 30.0
UNWELL_SECONDS = 90.0
"""A service that does not answer for so long is started again."""
LONGEST_PAUSE_SECONDS = 30.0


class Lost(Exception):
    """A process ended, or what it runs on is gone; says how."""


class Member:
    """One process of the run: `start` it, ask how it `ended`, `stop` it."""

    def __init__(self, ray: Any, name: str, options: Mapping[str, Any], log: Path, seconds: float) -> None:
        """options: of its actor, which say where it may be. seconds: the longest wait for room there."""
        self.ray, self.name, self.options, self.log, self.seconds = ray, name, dict(options), log, seconds
        self.address: tuple[str, int] = ("", 0)
        self.place: Any = None

    def settle(self, keep_port: bool = False) -> tuple[str, int]:
        """Its host and a free port there, or its last port; what runs there ends, or its actor is made."""
        if self.place is None:
            self.place = self.ray.remote(Place).options(**self.options).remote()
        else:  # what hangs there still holds the port
            self._ask(self.place.stop.remote(0), PLACE_SECONDS)
        found = self._ask(self.place.address.remote(self.address[1] if keep_port else None), self.seconds)
        self.address = (found[0], found[1])
        return self.address

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the process where it has settled."""
        folder = str(Path.cwd())
        started = self.place.start.remote(list(command), dict(environment), folder, str(self.log))
        self._ask(started, PLACE_SECONDS)

    def ended(self) -> tuple[int, str] | None:
        """None while it runs, else its exit status and last words. Raises Lost where its place is."""
        if self.place is None:
            raise Lost(f"{self.name} has no place")
        return self._ask(self.place.state.remote(), PLACE_SECONDS)

    def stop(self, seconds: float) -> None:
        """End the process, asked to for so long; then its place, which may be lost already."""
        if self.place is not None:
            with contextlib.suppress(Lost):
                self._ask(self.place.stop.remote(seconds), seconds + PLACE_SECONDS)
            self.leave()

    def leave(self) -> None:
        """Give up the place: its process ends with it."""
        if self.place is not None:
            with contextlib.suppress(Exception):  # it may have died, or the cluster with it
                self.ray.kill(self.place)
            self.place = None

    def _ask(self, reference: Any, seconds: float) -> Any:
        try:
            return self.ray.get(reference, timeout=seconds)
        except self.ray.exceptions.GetTimeoutError:
            self.leave()
            raise Lost(f"{self.name}: its place does not answer within {seconds:g} s") from None
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause or error
            raise Lost(f"{self.name}: {type(cause).__name__}: {_first_line(cause)}") from error
        except self.ray.exceptions.RayError as error:
            self.leave()
            raise Lost(f"{self.name}: its place is lost: {type(error).__name__}") from error


class Service(Member):
    """An engine or a replica: a member that answers at a URL, and is started again until it does."""

    def __init__(
        self,
        ray: Any,
        name: str,
        options: Mapping[str, Any],
        log: Path,
        seconds: float,
        command: Callable[[str, int], Sequence[str]],
        environment: Mapping[str, str],
        health: str,
        max_restarts: int,
    ) -> None:
        """command: for its host and port. health: the path that says it is well. The rest as a Member's."""
        super().__init__(ray, name, options, log, seconds)
        self.command, self.environment, self.health = command, environment, health
        self.max_restarts = max_restarts
        self.url = ""
        self.well = threading.Event()
        self.given_up: str | None = None
        """Why it is started no more."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name=self.name)

    def begin(self) -> None:
        """Start it, and look after it from now on."""
        self._thread.start()

    def end(self, seconds: float) -> None:
        """Look after it no more, and end it."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(LOOK_EVERY_SECONDS + HEALTH_TIMEOUT_SECONDS)
        self.stop(seconds)

    def _keep(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            try:
                self._start()
                self._watch()
            except Exception as error:  # whatever it is, the run goes on with the others
                if self._stopping.is_set():
                    return
                failures = 1 if self.well.is_set() else failures + 1
                self.well.clear()
                self._told(error, failures)
                if failures > self.max_restarts:
                    self.given_up = str(error)
                    return self.stop(0)
                self._stopping.wait(pause_seconds(failures - 1))

    def _start(self) -> None:
        host, port = self.settle(keep_port=True)
        self.url = f"http://{host}:{port}"
        self.start(self.command(host, port), self.environment)

    def _watch(self) -> None:
        """Return when it is to stop; raises Lost when it has ended, or does not answer."""
        answered = time.monotonic()
        while not self._stopping.wait(LOOK_EVERY_SECONDS):
            if (end := self.ended()) is not None:
                raise Lost(f"{self.name}: exit status {end[0]}: {end[1]}")
            if self._answers():
                answered = time.monotonic()
                if not self.well.is_set():
                    logger.info("%s answers at %s", self.name, self.url)
                    self.well.set()
            unwell = time.monotonic() - answered
            if unwell > (UNWELL_SECONDS if self.well.is_set() else self.seconds):
                raise Lost(f"{self.name}: no answer at {self.url}{self.health} for {unwell:.0f} s")

    def _answers(self) -> bool:
        try:
            return httpx.get(
                self.url + self.health, timeout=HEALTH_TIMEOUT_SECONDS, trust_env=False
            ).is_success
        except httpx.HTTPError:
            return False

    def _told(self, error: Exception, failures: int) -> None:
        told = "given up" if failures > self.max_restarts else "started again"
        unexpected = "" if isinstance(error, Lost) else f"{type(error).__name__} "
        logger.warning("%s%s; %s (see %s)", unexpected, error, told, self.log)


def pause_seconds(in_vain: int) -> float:
    """Before another start, after so many in vain: a machine that is lost is not known for it at once."""
    return min(2.0**in_vain - 1, LONGEST_PAUSE_SECONDS)


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [""])[0]
