"""Teaches a policy the protocol from demonstrations, with TRL's SFTTrainer.

A demonstration is a trajectory written down without tokens: thoughts, searches with the passages they
found, an answer. It is encoded segment by segment, as the agent encodes a rollout, so the policy sees
in training the very tokens that it will see when it searches. The loss is on the tokens that the
policy would have written, or (`learn_everything`) on all of them, which also teaches a small model to
read.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from agent.policy import Policy
from agent.protocol import Answer, Protocol, Search
from agent.rollout import encode_prompt
from agent.search_tool import Neutraliser
from agent.trajectory import SegmentKind
from data.errors import DataError
from data.jsonl import numbered_jsonl
from data.records import Passage
from rl.config import WarmStartConfig

if TYPE_CHECKING:
    from trl.trainer.sft_config import SFTConfig

Span = tuple[SegmentKind, str]


def demonstration_spans(record: Mapping[str, Any], protocol: Protocol) -> Iterator[Span]:
    """The segments of a demonstration as text, the prompt first (see docs/data-formats.md).

    Passages are neutralised as in a rollout, but for the tokenizer's own special tokens. Raises
    KeyError or TypeError where the record lacks a field: the caller knows file and line.
    """
    neutralise = Neutraliser(protocol)
    yield SegmentKind.PROMPT, protocol.prompt(record["question"])
    for step in record["steps"]:
        if "answer" in step:
            yield SegmentKind.POLICY, protocol.render_turn(step["think"], Answer(step["answer"]))
            continue
        yield SegmentKind.POLICY, protocol.render_turn(step["think"], Search(step["search"]))
        passages = [
            Passage(p["id"], neutralise(p["text"]), neutralise(p.get("title", ""))) for p in step["passages"]
        ]
        rendered = protocol.render_passages(passages[: protocol.top_k])
        yield SegmentKind.OBSERVATION, protocol.render_observation(rendered)
    if protocol.chat:
        return  # a follow-up would be another user turn, which no rollout has
    for more in record.get("follow_ups", ()):
        yield SegmentKind.PROMPT, protocol.prompt(more["question"])
        yield SegmentKind.POLICY, protocol.render_turn(more["think"], Answer(more["answer"]))


def encode_demonstration(
    spans: Sequence[Span], policy: Policy, protocol: Protocol, learn_everything: bool
) -> dict[str, list[int]]:
    """input_ids and labels of one demonstration; -100 is outside the loss."""
    input_ids, labels = [], []
    for kind, text in spans:
        if kind is SegmentKind.PROMPT and not input_ids:  # not a follow-up
            _, ids = encode_prompt(text, protocol, policy.tokenizer)
        else:
            ids = policy.tokenizer.encode(text, add_special_tokens=False)
        input_ids += ids
        learnt = learn_everything or kind is SegmentKind.POLICY
        labels += ids if learnt else [-100] * len(ids)
    return {"input_ids": input_ids, "labels": labels}


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the matrices inside the layers, AdamW for everything else.

    Both take the same learning rate: Muon's updates are scaled to AdamW's size (Liu et al. 2025,
    arXiv 2502.16982).
    """

    def __init__(self, model: PreTrainedModel, config: WarmStartConfig) -> None:
        named = dict(model.named_parameters())
        inner = [name for name, p in named.items() if p.ndim == 2 and ".layers." in name]
        rest = [p for name, p in named.items() if name not in inner]
        lr, decay = config.learning_rate, config.weight_decay
        self._parts = (
            torch.optim.Muon(
                [named[n] for n in inner], lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(rest, lr, betas=(0.9, 0.95), weight_decay=decay),
        )
        super().__init__(named.values(), defaults={})
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of all parameters."""
        for part in self._parts:
            part.step()


def load_demonstrations(path: str | Path, protocol: Protocol) -> list[list[Span]]:
    """All demonstrations of a JSONL file as spans. Raises DataError naming the line that is malformed."""
    demonstrations = []
    for number, record in numbered_jsonl(path):
        try:
            demonstrations.append(list(demonstration_spans(record, protocol)))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}:{number}: not a demonstration: {error!r}") from error
    if not demonstrations:
        raise DataError(f"{path}: holds no demonstration")
    return demonstrations


def warm_start(
    policy: Policy,
    demonstrations: Sequence[Sequence[Span]],
    protocol: Protocol,
    out: Path,
    config: WarmStartConfig,
) -> None:
    """Fine-tune the policy in place on the demonstrations and save it in `out`."""
    from datasets import Dataset
    from trl.trainer.sft_trainer import SFTTrainer

    rows = [encode_demonstration(d, policy, protocol, config.learn_everything) for d in demonstrations]
    random.Random(config.seed).shuffle(rows)
    with TemporaryDirectory() as scratch:  # nothing is saved there, but the trainer wants a folder
        trainer = SFTTrainer(
            model=policy.model,
            args=_arguments(scratch, policy, config),
            train_dataset=Dataset.from_list(rows),
            processing_class=policy.tokenizer,
            optimizers=(MuonAndAdamW(policy.model, config), None),
        )
        trainer.train()
    policy.save(out, protocol.name)
    policy.model.eval()


def _arguments(scratch: str, policy: Policy, config: WarmStartConfig) -> SFTConfig:
    from trl.trainer.sft_config import SFTConfig

    return SFTConfig(
        output_dir=scratch,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=max(1, config.steps // 20),
        max_length=None,
        train_sampling_strategy="group_by_length" if config.group_by_length else "random",
        bf16=False,
        use_cpu=policy.model.device.type == "cpu",
        gradient_checkpointing=False,
        logging_steps=max(1, config.steps // 20),
        save_strategy="no",
        report_to="none",
        seed=config.seed,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
