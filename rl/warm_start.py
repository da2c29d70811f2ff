"""Teaches a policy the protocol from demonstrations, with TRL's SFTTrainer.

A demonstration (`demonstrations.py`) is encoded segment by segment, as the agent encodes a rollout, so
the policy sees in training the very tokens that it will see when it searches. The loss is on the tokens
that the policy would have written, or (`learn_everything`) on all of them, which also teaches a small
model to read.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from agent.policy import Policy
from agent.prompt import encode_prompt, make_frame
from agent.protocol import Protocol
from agent.trajectory import SegmentKind
from rl.config import WarmStartConfig
from rl.demonstrations import Span

if TYPE_CHECKING:
    from trl.trainer.sft_config import SFTConfig


def encode_demonstration(
    spans: Sequence[Span], policy: Policy, protocol: Protocol, learn_everything: bool
) -> dict[str, list[int]]:
    """input_ids and labels of one demonstration; -100 is outside the loss.

    In a chat template that begins the policy's thoughts, the demonstration does not begin them again.
    """
    frame, before = make_frame(protocol, policy.tokenizer), ""
    opening = frame.opening(protocol)
    input_ids, labels = [], []
    for kind, text in spans:
        if kind is SegmentKind.PROMPT and not input_ids:  # not a follow-up
            text, ids = encode_prompt(text, protocol, policy.tokenizer, frame)
        else:
            if kind is SegmentKind.OBSERVATION:
                text += opening
            elif protocol.opens_thought(before):
                text = text.removeprefix(f"<{protocol.think_tag}>")
            ids = policy.tokenizer.encode(text, add_special_tokens=False)
        before = text
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

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of all parameters."""
        for part in self._parts:
            part.step()


def warm_start(
    policy: Policy,
    demonstrations: Sequence[Sequence[Span]],
    protocol: Protocol,
    out: Path,
    config: WarmStartConfig,
    log: Callable[[int, Mapping[str, float]], None] = lambda step, metrics: None,
    progress: Callable[[int, int], None] = lambda step, steps: None,
) -> None:
    """Fine-tune the policy in place on the demonstrations and save it in `out`.

    log gets the metrics of a step, progress the step and their number.
    """
    from datasets import Dataset
    from transformers import PrinterCallback
    from transformers.utils.logging import disable_progress_bar
    from trl.trainer.sft_trainer import SFTTrainer

    from retriever_server.training.reporter import Reporter

    disable_progress_bar()

    rows = [encode_demonstration(d, policy, protocol, config.learn_everything) for d in demonstrations]
    random.Random(config.seed).shuffle(rows)
    with TemporaryDirectory() as scratch:  # nothing is saved there, but the trainer wants a folder
        trainer = SFTTrainer(
            model=policy.model,
            args=_arguments(scratch, policy, config),
            train_dataset=Dataset.from_list(rows),
            processing_class=policy.tokenizer,
            optimizers=(MuonAndAdamW(policy.model, config), None),
            callbacks=[Reporter(log, progress)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    policy.save(out, protocol)
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
        disable_tqdm=True,
        report_to="none",
        seed=config.seed,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
