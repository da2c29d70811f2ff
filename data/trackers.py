"""Trackers of a run's numbers besides metrics.jsonl: none, Weights & Biases, Trackio or TensorBoard."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.request import getproxies

from data.errors import ConfigError, first_line
from data.machine.listening import why_silent
from data.settings import WandbConfig
from data.text import markdown_table

_OFFLINE = "--wandb.mode offline keeps the run on this disk"
_INIT_SECONDS = 30


class Tracker:
    """Receiver of a run's numbers; this one, of runs that asked for none, forgets them."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step."""

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Record a table of one step, such as trajectories."""

    def close(self) -> None:
        """Send what is pending; nothing is logged afterwards."""


def check_tracker(config: WandbConfig) -> None:
    """Raise ConfigError, within seconds, where the tracker that is asked for cannot be logged to."""
    if config.project is None:
        return
    name = config.tracker or "wandb"
    if name == "wandb":
        return check_wandb(config.mode)
    try:
        importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise ConfigError(f"wandb.tracker = {name}: needs the package {name} (pip install {name})") from error


def open_tracker(folder: Path, settings: Mapping[str, Any], config: WandbConfig) -> Tracker:
    """The tracker that is asked for; one that forgets everything where no project is named."""
    if config.project is None:
        return Tracker()
    if config.tracker == "trackio":
        return TrackioTracker(folder, settings, config.project)
    if config.tracker == "tensorboard":
        return TensorBoardTracker(folder, settings, config.project)
    return WandbTracker(folder, settings, config.project, config.mode)


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
        silent = "prompt" in inspect.signature(wandb.login).parameters  # older wandb: log in without asking
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
        self._run.log({"step": step, **metrics})

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import wandb

        self._run.log({"step": step, name: wandb.Table(columns=list(columns), data=[*map(list, rows)])})

    def close(self) -> None:
        self._run.finish()


class TrackioTracker(Tracker):
    """Tracker that logs to Trackio, which keeps its runs on this disk."""

    def __init__(self, folder: Path, config: Mapping[str, Any], project: str) -> None:
        import trackio  # pyright: ignore[reportMissingImports]  # an extra that few have

        self._trackio = trackio
        trackio.init(project=project, name=folder.name, config=dict(config), resume="allow")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._trackio.log(dict(metrics), step=step)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import pandas

        frame = pandas.DataFrame([*map(list, rows)], columns=list(columns))
        self._trackio.log({name: self._trackio.Table(dataframe=frame)}, step=step)

    def close(self) -> None:
        self._trackio.finish()


class TensorBoardTracker(Tracker):
    """Tracker that writes event files into FOLDER/tensorboard/PROJECT."""

    def __init__(self, folder: Path, config: Mapping[str, Any], project: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard" / project))
        self._writer.add_text("config", f"```json\n{json.dumps(dict(config), indent=1, default=str)}\n```")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._writer.add_text(name, markdown_table(columns, rows, "---"), step)

    def close(self) -> None:
        self._writer.close()
