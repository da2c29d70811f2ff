"""The numbers of a trainer of transformers, handed on under our names, and how far it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback


class Reporter(TrainerCallback):
    """Hands the numbers of a trainer on under `group/name`, and says how far it is."""

    def __init__(
        self, log: Callable[[int, Mapping[str, float]], None], progress: Callable[[int, int], None]
    ) -> None:
        self._log, self._progress = log, progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show the progress before the first step."""
        self._progress(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Log before a checkpoint, too: nothing is lost that a resumed run does not log again."""
        self._progress(state.global_step, state.max_steps)
        if state.global_step % args.save_steps == 0:
            control.should_log = True
        # The last checkpoint is scored, wherever it falls.
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """One line of metrics."""
        found = {
            _name(key): value
            for key, value in (logs or {}).items()
            if isinstance(value, int | float) and key not in _LEFT_OUT
        }
        if state.is_world_process_zero and found:
            self._log(state.global_step, found)


_LEFT_OUT = ["total_flos", "train_loss", "train_steps_per_second", "eval_runtime", "eval_samples_per_second"]
_LEFT_OUT += ["eval_steps_per_second", "eval_model_preparation_time"]
_SPEED = {"train_samples_per_second": "examples_per_second", "train_runtime": "seconds"}


def _name(key: str) -> str:
    if key in _SPEED:
        return f"speed/{_SPEED[key]}"
    return f"dev/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
