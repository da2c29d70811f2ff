"""A process wherever Ray has put it, kept by an actor: the process ends with the actor, however that ends.

All waits end: at a deadline, or when the actor or its machine is lost, which is a `Lost` with the reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.errors import first_line
from retriever_server.client.server_process import Place

PLACE_SECONDS = 60.0
"""The longest wait for an actor that is there to answer."""


class Lost(Exception):
    """A process ended, or what it runs on is gone; says how."""


class Actor(Place):
    """The actor on the machine that Ray has chosen."""

    def __init__(self) -> None:
        import ray  # pyright: ignore[reportMissingImports]  (an extra)

        super().__init__(ray.util.get_node_ip_address())


class RayProcess(Place):
    """A place of the cluster, as the launcher sees it; another is made where one was lost."""

    def __init__(self, ray: Any, name: str, options: Mapping[str, Any], log: Path, seconds: float) -> None:
        """options: of its actor, which say where it may be. seconds: the longest wait for room there."""
        self.name, self.log = name, log
        self._ray, self._options, self._seconds = ray, dict(options), seconds
        self._actor: Any = None

    def address(self, port: int | None = None) -> tuple[str, int]:
        """As a place's; its actor is made where there is none."""
        if self._actor is None:
            self._actor = self._ray.remote(Actor).options(**self._options).remote()
        host, taken = self._ask("address", self._seconds, port)
        return host, taken

    def start(
        self, command: Sequence[str], environment: Mapping[str, str | None], folder: str, log: str
    ) -> None:
        self._ask("start", PLACE_SECONDS, list(command), dict(environment), folder, log)

    def state(self) -> tuple[int, str] | None:
        """As a place's. Raises Lost where that is lost."""
        return self._ask("state", PLACE_SECONDS)

    def stop(self, seconds: float) -> None:
        """End the process, asked to for so long; then its place, which may be lost already."""
        if self._actor is not None:
            with contextlib.suppress(Lost):
                self._ask("stop", seconds + PLACE_SECONDS, seconds)
            self._leave()

    def _ask(self, method: str, seconds: float, *arguments: Any) -> Any:
        errors = self._ray.exceptions
        if self._actor is None:
            raise Lost(f"{self.name}: has no place")
        try:
            return self._ray.get(getattr(self._actor, method).remote(*arguments), timeout=seconds)
        except errors.GetTimeoutError:
            self._leave()
            raise Lost(f"{self.name}: its place does not answer within {seconds:g} s") from None
        except errors.RayTaskError as error:
            cause = error.cause or error
            raise Lost(f"{self.name}: {type(cause).__name__}: {first_line(cause)}") from error
        except errors.RayError as error:
            self._leave()
            raise Lost(f"{self.name}: its place is lost: {type(error).__name__}") from error

    def _leave(self) -> None:
        """Give up the place: its process ends with it."""
        actor, self._actor = self._actor, None
        if actor is not None:
            with contextlib.suppress(Exception):  # it may have died, or the cluster with it
                self._ray.kill(actor)
