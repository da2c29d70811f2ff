"""The trainers of sentence-transformers with checkpoints that are whole or not there, and a stop at NaN.

Data, losses, GradCache, optimiser, mixed precision and processes are theirs, and so is the loop. Images are
read and decoded where batches are put together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.modules import Transformer
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from data.checkpoint import best_checkpoint, mark_best, save_checkpoint
from data.errors import ConfigError, DataError, RunStopped, SleuthError
from data.models.sharding import copy_whole, gather
from data.pages.modalities import read
from data.records import Input, Item
from retriever_server.encoders.image_inputs import as_model_input, uncut
from retriever_server.encoders.read_spec import placeholders
from retriever_server.encoders.spec import Kind

Log = Callable[[int, Mapping[str, float]], None]
"""Takes a step and its metrics."""
Progress = Callable[[int, int], None]
"""Takes a step and their number."""
WEIGHTS = "weights.safetensors"
"""File of a checkpoint with all that is trained, and buffers; what is frozen comes from the base again."""


class Training:
    """Mixed into a trainer of sentence-transformers: see `make_trainer`."""

    args: Any
    model: Any
    loss: Any
    optimizer: Any
    lr_scheduler: Any
    is_distributed_loading_by_transformers: bool
    """True where the weights are divided over the processes (transformers' name)."""
    state: Any
    control: Any
    accelerator: Any

    def add_model_card_callback(self, default_args_dict: Any) -> None:
        """No model card: its statistics would tokenise the data before the first step."""

    def _build_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._build_dataloader(*args, **kwargs)  # type: ignore[misc]
        if getattr(loader.batch_sampler, "comes_out_even", False):
            loader.batch_sampler.batch_size = None  # or accelerate drops batches that are not full
        return loader

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """One micro-batch; a loss that is no number stops the run before the optimiser sees its gradient."""
        try:
            loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        except (AttributeError, TypeError, ValueError) as error:
            if isinstance(error, SleuthError) or "label" in args[1]:
                raise
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                f"loss: {type(self.loss).__name__} takes no examples like these, without labels "
                f"(labels: true gives it a teacher's scores, form: pair or list others): {reason}"
            ) from error
        if not torch.isfinite(loss):
            self._stop(f"the loss is {float(loss)}")
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)  # type: ignore[misc]
        if norm is not None and not math.isfinite(norm):
            self._stop(f"the gradient's norm is {float(norm)}")
        return norm

    def _stop(self, what: str) -> None:
        raise RunStopped(
            f"step {self.state.global_step + 1}: {what}; the last checkpoint is kept in {self._folder}: "
            "lower the learning rate, or train in float32"
        )

    @property
    def _folder(self) -> Path:
        return Path(self.args.output_dir) / "checkpoints"

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The folder step-N, written by the first process, with the random states of all."""
        states = Path(self.args.output_dir) / ".random-states"
        states.mkdir(parents=True, exist_ok=True)
        self._save_rng_state(str(states))  # type: ignore[attr-defined]
        weights, optimizer = gather(self._tensors(), self.args.should_save), self._optimizer_state()
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            save_checkpoint(
                self._folder,
                self.state.global_step,
                lambda to: self._write(to, states, weights, optimizer),
                self.args.save_total_limit,
            )
            best, state = best_checkpoint(self._folder), self.state
            is_best = state.best_global_step == state.global_step  # by `metric_for_best_model`
            if is_best and (best is None or state.best_metric > best[1]):
                mark_best(self._folder, state.global_step, state.best_metric)
        self.accelerator.wait_for_everyone()

    def _optimizer_state(self) -> dict[str, Any]:
        """The optimiser's state, whole where this process saves; all processes must ask."""
        state = self.optimizer.state_dict()
        if not self.is_distributed_loading_by_transformers:
            return state
        kept = {number: gather(each, self.args.should_save) for number, each in state["state"].items()}
        return {**state, "state": kept}

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> Any:
        """Take over what a checkpoint holds; of divided weights each process keeps its part alone."""
        if checkpoint is None or not self.is_distributed_loading_by_transformers:
            return super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        state = torch.load(
            Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True
        )
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        for number, moments in state["state"].items():
            for name, value in moments.items():
                if value.shape == weights[number].shape:
                    moments[name] = torch.empty_like(weights[number], requires_grad=False)
                    copy_whole(moments[name], value)
        self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _write(
        self, folder: Path, states: Path, weights: Mapping[str, torch.Tensor], optimizer: Mapping[str, Any]
    ) -> None:
        save_file({n: v.detach().contiguous().clone() for n, v in weights.items()}, folder / WEIGHTS)
        torch.save(optimizer, folder / OPTIMIZER_NAME)
        torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
        self._save_scaler(str(folder))  # type: ignore[attr-defined]
        self.state.save_to_json(str(folder / "trainer_state.json"))
        for state in states.iterdir():
            state.rename(folder / state.name)
        states.rmdir()

    def _load_from_checkpoint(self, checkpoint_path: str, model: Any = None) -> None:
        self.load_weights(Path(checkpoint_path))

    def load_weights(self, checkpoint: Path) -> None:
        """Put the weights of a checkpoint into the model and the loss."""
        load_tensors(checkpoint, self._tensors())

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Trained tensors and buffers by name, each once, whatever wraps the model."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        known = {id(value) for value in model.parameters()}
        own = ((name, value) for name, value in self.loss.named_parameters() if id(value) not in known)
        return tensors_of(model) | {f"loss.{name}": value for name, value in own if value.requires_grad}


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Trained tensors and buffers of a model by name."""
    named = {f"model.{name}": value for name, value in model.named_parameters() if value.requires_grad}
    return named | {f"model.{name}": value for name, value in model.named_buffers()}


def load_tensors(checkpoint: Path, into: Mapping[str, torch.Tensor], prefix: str = "") -> None:
    """Write those of a checkpoint whose names begin so. Raises DataError where others are expected."""
    state = {n: v for n, v in load_file(checkpoint / WEIGHTS).items() if n.startswith(prefix)}
    if odd := set(into) ^ set(state):
        raise DataError(f"{checkpoint}: of another model ({min(odd)} is only in one of them)")
    for name, value in state.items():
        copy_whole(into[name], value)


class Scores(BaseEvaluator):
    """An evaluator of sentence-transformers out of a function of the model."""

    def __init__(self, score: Callable[[Any], dict[str, float]]) -> None:
        super().__init__()
        self._score = score

    def __call__(self, model: Any, output_path: Any = None, epoch: Any = -1, steps: int = -1) -> Any:
        """Metric -> value; the model is left as it was."""
        training = model.training
        try:
            return self._score(model)
        finally:
            model.train(training)


class Reporter(TrainerCallback):
    """Hands the numbers of a trainer on under `group/name`, and says how far it is."""

    def __init__(self, log: Log, progress: Progress) -> None:
        self._log, self._progress = log, progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
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


def make_trainer(
    kind: Kind, score: Callable[[Any], dict[str, float]] | None, log: Log, progress: Progress, **given: Any
) -> Any:
    """The trainer of sentence-transformers for a kind of model, with `Training`; score: metrics on dev."""
    of = type(kind.trainer_class.__name__, (Training, kind.trainer_class), {})
    trainer = of(
        evaluator=None if score is None else Scores(score), callbacks=[Reporter(log, progress)], **given
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class ImageCollator:
    """`preprocess` of a model for items in training: the workers of the data loader run it, and open images.

    Raises DataError naming an image that cannot be read.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._placeholders = model, placeholders(model)

    def __call__(self, inputs: Sequence[Input], **options: Any) -> dict[str, Any]:
        """The features of a column of a batch."""
        pictures = [read(each) if isinstance(each, Item) else None for each in inputs]
        each = zip(inputs, pictures, strict=True)
        given = [as_model_input(item, picture, self._placeholders) for item, picture in each]
        preprocess = partial(self._model.preprocess, **options)
        shown = any(picture is not None for picture in pictures)
        return uncut(self._model, given, preprocess) if shown else preprocess(given)


def without_absent_images(model: Any) -> None:
    """Let a model of sentence-transformers take texts cut out of a batch that had images elsewhere.

    The pixels of an item without images are zeros there; some vision towers fail where nothing else is left.
    """
    for module in model.modules():
        if isinstance(module, Transformer):
            module.register_forward_pre_hook(_drop_absent_images)


def _drop_absent_images(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
    count = given[0].get("num_images_per_sample") if given else None
    if count is None or int(count.sum()):
        return None
    kept = {key: value for key, value in given[0].items() if not key.startswith("pixel_")}
    return (kept, *given[1:])
