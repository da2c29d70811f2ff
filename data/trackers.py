"""Trackers of a run's numbers besides metrics.jsonl: none, or Weights & Biases."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.request import getproxies

from data.errors import ConfigError, first_line
from data.listening import why_silent

_OFFLINE = "--wandb.mode offline keeps the run on this disk"
_INIT_SECONDS = 30


class Tracker:
    """Receiver of a run's numbers; this one, of runs that asked for none, forgets them."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step."""

    def close(self) -> None:
        """Send what is pending; nothing is logged afterwards."""


def check_wandb(mode: Literal["online", "offline"]) -> None:
    """Raise ConfigError, within seconds, where Weights & Biases cannot be logged to."""
    if mode == "offline":
        return
    import wandb
    from wandb.errors import Error

    url = str(wandb.setup().settings.base_url)
    if not getproxies() and (reason := why_silent(url)):
        raise ConfigError(f"wandb: {url} cannot be reached ({reason}); {_OFFLINE}")
    try:
        silent = "prompt" in inspect.signature(wandb.login).parameters  # else of before it could be told
        logged_in = wandb.login(prompt=False) if silent else wandb.api.api_key
    except Error as error:
        raise ConfigError(f"wandb: {first_line(error)}; {_OFFLINE}") from error
    if not logged_in:
        raise ConfigError(f"wandb: not logged in to {url}: `wandb login` does it once; {_OFFLINE}")


class WandbTracker(Tracker):
    """Tracker that logs to Weights & Biases; mode "offline" writes into the run's folder, without a network.

    Name and id are those of the folder, so that a resumed run continues its curve. It goes back in steps,
    which wandb's own counter refuses: `step` is therefore a metric, and the x axis of all others.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], project: str, mode: Literal["online", "offline"]
    ) -> None:
        import wandb
        from wandb.errors import Error

        try:
            self._run = wandb.init(
                dir=str(folder),
                project=project,
                name=folder.name,
                id=folder.name,
                resume="allow" if mode == "online" else None,
                config=dict(config),
                mode=mode,
                settings=wandb.Settings(silent=True, console="off", init_timeout=_INIT_SECONDS),
            )
        except Error as error:
            raise ConfigError(f"wandb: {first_line(error)}; {_OFFLINE}") from error
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics with their step."""
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        """Finish the wandb run."""
        self._run.finish()
