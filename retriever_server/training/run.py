"""Train by a recipe: build model and data, check them, train, and export the folder that serves."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.losses.gradcache import uses_gradient_cache
from transformers import TrainerState, set_seed

from data.checkpoint import best_checkpoint, latest_checkpoint
from data.errors import ConfigError, DataError
from data.examples import Examples
from data.jsonl import read_json, write_json
from data.machine.device import choose_dtype, resolve_device
from data.models.lora import add_adapters
from data.models.sharding import shard
from data.progress import Bar, no_bar
from retriever_server.encoders.read_spec import outer_transformers
from retriever_server.encoders.spec import CROSS, EncodingSpec
from retriever_server.training.batch_samplers import Mixture, NoDuplicates, Shuffled
from retriever_server.training.build_components import (
    ModelInTraining,
    Prepared,
    build_loss,
    build_model,
    prepare,
    with_style,
)
from retriever_server.training.examples import as_dataset, passages_as_dataset, split_by_pair
from retriever_server.training.export import check_before, export
from retriever_server.training.recipe import RetrieverRecipe
from retriever_server.training.trainer import (
    ImageCollator,
    Log,
    Progress,
    load_tensors,
    make_trainer,
    tensors_of,
    without_absent_images,
)

logger = logging.getLogger(__name__)

UNTRAINED = "untrained.json"
"""File of a run folder with the scores on dev before training."""


def train(
    recipe: RetrieverRecipe,
    log: Log = lambda step, metrics: None,
    progress: Progress = lambda step, steps: None,
    on_start: Callable[[int], None] = lambda step: None,
    bar: Bar = no_bar,
    prepared: Prepared | None = None,
) -> Path | None:
    """Train, or go on after the last checkpoint of `recipe.out`, to the folder of the model that serves.

    log gets the metrics of a step, progress the step and their number, on_start the step that is resumed;
    bar shows the evaluations on dev. prepared: the data, where it is read already.
    Of several processes only the first saves; the others give None. Raises ConfigError and DataError
    before anything is trained, RunStopped at a loss that is no number.
    """
    trainer, trained = build_trainer(recipe, log, progress, bar, prepared)
    out = Path(recipe.out)
    latest = latest_checkpoint(out / "checkpoints")
    on_start(latest.step if latest else 0)
    if trainer.evaluator is not None and latest is None:
        write_json(out / UNTRAINED, trainer.evaluate())  # what the model can before it is trained
    if latest and latest.step >= _steps(trainer, recipe):  # the loop would do one more
        trainer.load_weights(latest.path)
        trainer.state = TrainerState.load_from_json(str(latest.path / "trainer_state.json"))
    else:
        try:
            trainer.train(resume_from_checkpoint=str(latest.path) if latest else None)
        except DataError as error:  # from a worker it comes with its traceback in the message
            raise DataError(str(error).strip().splitlines()[-1].split("DataError: ")[-1]) from error
    if not trainer.args.should_save:
        return None
    best = best_checkpoint(out / "checkpoints") if recipe.export == "best" else None
    last = best[0] if best else latest_checkpoint(out / "checkpoints")
    assert last is not None
    if best and last.step != trainer.state.global_step:
        metric = trainer.args.metric_for_best_model
        logger.info("exporting step %d, the best (%s %.4f)", last.step, metric, best[1])
    _warn_if_worse(trainer, out, last.step)
    if recipe.sharding == "fsdp":  # the processes that hold the other parts have left
        return export(_build_from(last.path, recipe, trainer.args.device), trained.spec, out / "model")
    if last.step != trainer.state.global_step:
        trainer.load_weights(last.path)
    # Without the wrapper that computes in bfloat16: what is saved serves in float32.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    return export(model, trained.spec, out / "model")


def _warn_if_worse(trainer: Any, out: Path, step: int) -> None:
    """Say so where what is exported scores less on dev than the model did before it was trained."""
    metric = f"eval_{trainer.args.metric_for_best_model}"
    scores = [row[metric] for row in trainer.state.log_history if metric in row and row["step"] == step]
    if not scores or not (out / UNTRAINED).exists():
        return
    before, after = read_json(out / UNTRAINED)[metric], scores[-1]
    if after < before:
        logger.warning(
            "step %d, which is exported, is worse than the untrained model (dev %s %.4f, before %.4f): "
            "lower learning_rate, or train on more or cleaner examples",
            step, trainer.args.metric_for_best_model, after, before,
        )  # fmt: skip


def _steps(trainer: Any, recipe: RetrieverRecipe) -> int:
    an_epoch = max(1, -(-len(trainer.get_train_dataloader()) // recipe.accumulate))
    return recipe.steps or math.ceil(recipe.epochs * an_epoch)


def build_trainer(
    recipe: RetrieverRecipe,
    log: Log,
    progress: Progress,
    bar: Bar = no_bar,
    prepared: Prepared | None = None,
) -> tuple[Any, ModelInTraining]:
    """Build the trainer that is ready to train, all checks passed, and what it trains."""
    if recipe.sharding == "fsdp" and _processes() == 1:
        raise ConfigError(
            "sharding = fsdp: one process trains; several do by accelerate launch --num_processes N"
        )
    _quiet()
    set_seed(recipe.seed)
    examples = (prepared or prepare(recipe)).sets
    dev = _dev_set(recipe, examples, bar)
    trained = with_style(build_model(recipe), examples)
    model, spec = trained.model, trained.spec
    sets = _data(recipe, examples, trained)
    args = _arguments(recipe, trained, sets, dev)
    model.to(args.device)
    loss = build_loss(recipe, trained, _processes())
    if _processes() > 1 and hasattr(model[0], "sub_modules") and not uses_gradient_cache(loss):
        args.ddp_static_graph = True  # each tower is in some of the forward passes of a step, always the same
    if _processes() > 1 and trained.kind is CROSS:  # DDP finds what was used in a dict, in no BatchEncoding
        model.register_forward_hook(lambda module, given, found: dict(found))
    if spec is not None and args.should_save:  # only the first of several processes can write a model
        check_before(model, loss, spec, recipe.serves)
    _add_adapters(model, recipe)
    if recipe.gradient_checkpointing:
        for transformer in outer_transformers(model):
            transformer.gradient_checkpointing_enable({"use_reentrant": False})
    data: Any = {each.name: each.dataset for each in sets} if len(sets) > 1 else sets[0].dataset
    trainer = make_trainer(
        trained.kind,
        None if dev is None else partial(dev.score_model, kind=trained.kind, spec=spec),
        log,
        progress,
        model=model,
        args=args,
        loss=loss,
        train_dataset=data,
    )
    if trained.reads_files:
        trainer.data_collator.preprocess_fn = ImageCollator(model)
        without_absent_images(model)
    if recipe.sharding == "fsdp":
        _divide(trainer, recipe)
    return trainer, trained


def _add_adapters(model: Any, recipe: RetrieverRecipe) -> None:
    if recipe.lora.rank:
        for transformer in outer_transformers(model):
            add_adapters(transformer, recipe.lora, recipe.seed)


def _build_from(checkpoint: Path, recipe: RetrieverRecipe, device: Any) -> Any:
    """Return the model of a checkpoint, whole in this process."""
    set_seed(recipe.seed)
    model = build_model(recipe).model
    _add_adapters(model, recipe)
    load_tensors(checkpoint, tensors_of(model), "model.")
    return model.to(device)


def _divide(trainer: Any, recipe: RetrieverRecipe) -> None:
    """Divide the weights over the processes (FSDP2), which then average their gradients by themselves."""
    half = recipe.precision == "bfloat16" and trainer.args.device.type == "cuda"
    shard(trainer.model, torch.bfloat16 if half else None)
    trainer.is_distributed_loading_by_transformers = True  # the trainer wraps no such model


def _arguments(recipe: RetrieverRecipe, trained: ModelInTraining, sets: list[TrainSet], dev: Any) -> Any:
    cpu = resolve_device(recipe.device) == "cpu"
    cross = trained.kind is CROSS
    roles = {column: "query" if column == "anchor" else "document" for column in _columns(recipe)}
    unique = partial(NoDuplicates, processes=_processes())
    weights = [each.weight for each in sets]
    return trained.kind.trainer_class.training_args_class(
        output_dir=recipe.out,
        max_steps=recipe.steps or -1,
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup,
        lr_scheduler_type=recipe.schedule,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=choose_dtype(recipe.precision, "cpu" if cpu else "cuda") == "bfloat16",
        use_cpu=cpu,
        seed=recipe.seed,
        batch_sampler=unique if recipe.no_duplicates and not cross else Shuffled,
        multi_dataset_batch_sampler=partial(Mixture, weights=weights, together=_processes()),
        prompts={} if trained.spec is None else _prompts(recipe, trained.spec, sets),
        router_mapping={} if cross else roles,
        dataloader_num_workers=recipe.workers,
        save_strategy="steps",
        save_steps=recipe.save_every,
        save_total_limit=recipe.keep,
        metric_for_best_model=str(dev.measures[0]) if dev else None,
        greater_is_better=True,
        eval_strategy="steps" if dev else "no",
        eval_steps=recipe.save_every,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        **({"ddp_backend": "gloo"} if cpu and _processes() > 1 else {}),
    )


def _processes() -> int:
    """Return how many processes train, as every launcher tells."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _columns(recipe: RetrieverRecipe) -> list[str]:
    most = max(each.negatives for each in recipe.train)
    return ["anchor", "positive", *(f"negative_{i}" for i in range(1, most + 1))]


def _prompts(recipe: RetrieverRecipe, spec: EncodingSpec, sets: list[TrainSet]) -> dict[str, Any]:
    """Column -> prompt, as the model will put it before queries and passages; per set where they differ."""

    def of(query_prompt: str) -> dict[str, str]:
        texts = {c: query_prompt if c == "anchor" else spec.passage_prompt for c in _columns(recipe)}
        return {column: text for column, text in texts.items() if text}

    if all(each.query_prompt is None for each in recipe.train):
        return of(spec.query_prompt)
    given = [spec.query_prompt if each.query_prompt is None else each.query_prompt for each in recipe.train]
    if len(given) == 1:
        raise ConfigError(
            f"train.query_prompt = {given[0]!r}: with a single set say "
            "model.init_args.query_prompt, which is saved with the model"
        )
    return {each.name: of(given[each.number]) for each in sets}


@dataclass(frozen=True)
class TrainSet:
    """Examples of `recipe.train[number]`, all of one kind of pair: a batch comes from one set."""

    name: str
    number: int
    dataset: Any
    weight: float


def _data(recipe: RetrieverRecipe, examples: list[Any], trained: ModelInTraining) -> list[TrainSet]:
    spec = trained.spec
    render: Any = spec.render if spec is not None else lambda passage: passage.contents
    sets: list[TrainSet] = []
    for i, (each, of) in enumerate(zip(examples, recipe.train, strict=True)):
        name = f"set-{i + 1}"
        if of.form == "text":
            texts = spec.render_text if spec is not None else render
            sets.append(TrainSet(name, i, passages_as_dataset(each, texts), of.weight))
            continue
        data = as_dataset(
            each, render, of.negatives, of.form, of.labels, of.labels_of, of.weights, of.draws, recipe.seed,
            reads_files=trained.reads_files,
        )  # fmt: skip
        if trained.reads_files and of.form == "tuple":
            kinds = split_by_pair(data, each, render, of.shares, of.weight)
            sets += [TrainSet(f"{name} {kind}", i, *found) for kind, found in kinds.items()]
        else:
            sets.append(TrainSet(name, i, data, of.weight))
    return sets


def _dev_set(recipe: RetrieverRecipe, examples: list[Any], bar: Bar) -> Any:
    """The dev set of the recipe, checked to be held out from the training examples. Raises DataError."""
    if recipe.dev.queries is None:
        return None
    from retriever_server.training.dev import DevSet  # with what evaluates

    dev = DevSet(recipe.dev, recipe.train[0].corpus, Path(recipe.out) / "dev", bar)
    for each in examples:
        if isinstance(each, Examples):
            dev.check_held_out(each, recipe.dev.shared)
    return dev


def _quiet() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("sentence_transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
