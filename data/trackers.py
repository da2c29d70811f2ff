"""Where a run's numbers go besides metrics.jsonl: nowhere, or to Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol


class Tracker(Protocol):
    """Receives every metric of a run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step."""
        ...

    def close(self) -> None:
        """Send what is pending; nothing is logged afterwards."""
        ...


class NullTracker:
    """Sends nothing anywhere: the tracker of runs that asked for none."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Forget the metrics."""

    def close(self) -> None:
        """Do nothing."""


class WandbTracker:
    """Logs to Weights & Biases; `mode="offline"` writes under `directory`/wandb and needs no network.

    A resumed run goes back in steps, which wandb's own counter refuses: `step` is therefore a metric,
    and the x axis of all others. The same `run_id` continues the same curve.
    """

    def __init__(
        self,
        directory: Path | str,
        project: str = "sleuth",
        name: str | None = None,
        run_id: str | None = None,
        config: Mapping[str, Any] | None = None,
        mode: Literal["online", "offline"] = "online",
    ) -> None:
        import wandb

        self._run = wandb.init(
            dir=str(directory),
            project=project,
            name=name,
            id=run_id,
            resume="allow" if run_id and mode == "online" else None,
            config=dict(config or {}),
            mode=mode,
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics with their step."""
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        """Finish the wandb run."""
        self._run.finish()
