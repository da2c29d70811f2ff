"""Teaches a policy the protocol from demonstrations, with TRL's SFTTrainer.

A demonstration (`demonstrations.py`) is encoded segment by segment, as the agent encodes a rollout. The loss
is on the tokens that the policy would have written, or (`learn_everything`) on all of them, which also
teaches a small model to read. The model's head is applied at the tokens of the loss alone.
"""

from __future__ import annotations

import logging
import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from agent.policy import Policy
from agent.prompt import encode_prompt, make_frame
from agent.protocol import Protocol
from agent.search_tool import fit_observation
from agent.trajectory import SegmentKind
from data.checkpoint import latest_checkpoint
from data.errors import DataError
from data.jsonl import write_json
from data.machine.device import choose_dtype
from rl.config import WarmStartConfig
from rl.demonstrations import CHECKPOINTS, RECORD_FILE, Span
from rl.learner.lora import add_lora, merged_state

if TYPE_CHECKING:
    from trl.trainer.sft_config import SFTConfig

logger = logging.getLogger(__name__)


def encode_demonstration(
    spans: Sequence[Span], policy: Policy, protocol: Protocol, learn_everything: bool
) -> dict[str, list[int]]:
    """input_ids and labels of one demonstration; -100 is outside the loss.

    An observation is cut to its budget as in a rollout. In a chat template that begins the policy's
    thoughts, the demonstration does not begin them again.
    """

    def encode(text: str) -> list[int]:
        return policy.tokenizer.encode(text, add_special_tokens=False)

    wrapped, unwrapped = protocol.observation.split("{passages}")
    frame, before = make_frame(protocol, policy.tokenizer), ""
    opening = frame.opening(protocol)
    input_ids, labels = [], []
    for kind, text in spans:
        if kind is SegmentKind.PROMPT and not input_ids:  # not a follow-up
            text, ids = encode_prompt(text, protocol, policy.tokenizer, frame)
        else:
            if kind is SegmentKind.OBSERVATION:
                passages = text.removeprefix(wrapped).removesuffix(unwrapped)
                text = fit_observation(passages, protocol, encode, protocol.max_observation_tokens)
                text += opening
            elif protocol.opens_thought(before):
                text = text.removeprefix(f"<{protocol.think_tag}>")
            ids = encode(text)
        before = text
        input_ids += ids
        learnt = learn_everything or kind is SegmentKind.POLICY
        labels += ids if learnt else [-100] * len(ids)
    return {"input_ids": input_ids, "labels": labels}


def obstacle(spans: Sequence[Span], policy: Policy, protocol: Protocol) -> str | None:
    """Name the limit of the protocol that this demonstration exceeds, so that no rollout could be like it."""
    turns = [text for kind, text in spans if kind is SegmentKind.POLICY]
    searches = sum(kind is SegmentKind.OBSERVATION for kind, _ in spans)
    longest = max(len(policy.tokenizer.encode(text, add_special_tokens=False)) for text in turns)
    if searches > protocol.max_turns:
        return f"more than max_turns = {protocol.max_turns} searches"
    if longest > protocol.max_response_tokens:
        return f"a turn of more than max_response_tokens = {protocol.max_response_tokens}"
    return None


def _encode_all(
    demonstrations: Sequence[Sequence[Span]], policy: Policy, protocol: Protocol, learn_everything: bool
) -> list[dict[str, list[int]]]:
    """The rows of the demonstrations that fit the protocol's limits; DataError where none does."""
    reasons = [obstacle(each, policy, protocol) for each in demonstrations]
    left_out = Counter(filter(None, reasons))
    for reason, count in left_out.items():
        logger.warning("%d of %d demonstrations are left out: %s", count, len(demonstrations), reason)
    if left_out.total() == len(demonstrations):
        raise DataError(f"no demonstration fits the protocol's limits: {', '.join(left_out)}")
    return [
        encode_demonstration(each, policy, protocol, learn_everything)
        for each, reason in zip(demonstrations, reasons, strict=True)
        if reason is None
    ]


class StayInFloat32(TorchFunctionMode):
    """Make `bfloat16()` a copy. Muon orthogonalises in it; a CPU that emulates it takes 14 times longer."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func` as it is but for `Tensor.bfloat16`."""
        return args[0].clone() if func is torch.Tensor.bfloat16 else func(*args, **(kwargs or {}))


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the matrices inside the layers, AdamW for everything else.

    Both take the same learning rate: Muon's updates are scaled to AdamW's size (Liu et al. 2025,
    arXiv 2502.16982).
    """

    def __init__(self, model: PreTrainedModel, config: WarmStartConfig) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        inner = [name for name, p in named.items() if p.ndim == 2 and ".layers." in name]
        rest = [p for name, p in named.items() if name not in inner]
        lr, decay = config.learning_rate, config.weight_decay
        self._parts = (
            torch.optim.Muon(
                [named[n] for n in inner], lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(rest, lr, betas=(0.9, 0.95), weight_decay=decay),
        )
        self._precision = StayInFloat32 if model.device.type == "cpu" else nullcontext
        super().__init__(named.values(), defaults={})
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        with self._precision():
            for part in self._parts:
                part.step()


def make_optimizer(model: PreTrainedModel, config: WarmStartConfig) -> torch.optim.Optimizer:
    """The optimiser that `config` names."""
    if config.optimizer == "muon":
        return MuonAndAdamW(model, config)
    lr, decay = config.learning_rate, config.weight_decay
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr, betas=(0.9, 0.95), weight_decay=decay)


def warm_start(
    policy: Policy,
    demonstrations: Sequence[Sequence[Span]],
    protocol: Protocol,
    out: Path,
    config: WarmStartConfig,
    log: Callable[[int, Mapping[str, float]], None] = lambda step, metrics: None,
    progress: Callable[[int, int], None] = lambda step, steps: None,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Fine-tune the policy in place on the demonstrations and save it in `out`.

    Goes on after the last checkpoint in `out`. log gets the metrics of a step, progress the step and their
    number. record: what the policy's folder tells of its making, beside the configuration.
    """
    from datasets import Dataset
    from transformers import PrinterCallback
    from transformers.utils.logging import disable_progress_bar
    from trl.trainer.sft_trainer import SFTTrainer

    from retriever_server.training.trainer import Reporter, Training

    class Supervised(Training, SFTTrainer):  # pyright: ignore[reportIncompatibleMethodOverride]
        """TRL's, with checkpoints that are whole or not there."""

        loss = torch.nn.Identity()  # has no weights to keep

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            """TRL's; on a CPU it would apply the head at every token, which takes longer than all else."""
            if self.args.device.type != "cpu" or self.aux_loss_enabled:
                return super().compute_loss(model, inputs, *args, **kwargs)
            with self.accelerator.autocast():
                loss, accuracy = _loss_of(model, **inputs)
            self._metrics["train"]["mean_token_accuracy"].append(accuracy)
            return loss

    disable_progress_bar()
    rows = _encode_all(demonstrations, policy, protocol, config.learn_everything)
    random.Random(config.seed).shuffle(rows)
    (out / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    write_json(out / RECORD_FILE, {**(record or {}), "training": asdict(config)})
    add_lora(policy.model, config.lora, config.seed)
    for parameter in policy.model.parameters():
        if parameter.requires_grad:  # adapters are of the type of their layer
            parameter.data = parameter.data.float()
    trainer: Any = Supervised(
        model=policy.model,
        args=_arguments(out, policy, config),
        train_dataset=Dataset.from_list(rows),
        processing_class=policy.tokenizer,
        optimizers=(make_optimizer(policy.model, config), None),
        callbacks=[Reporter(log, progress)],
    )
    trainer.remove_callback(PrinterCallback)
    latest = latest_checkpoint(out / CHECKPOINTS)
    trainer.train(resume_from_checkpoint=str(latest.path) if latest else None)
    policy.save(out, protocol, merged_state(policy.model) if config.lora.rank else None)
    shutil.rmtree(out / CHECKPOINTS)
    policy.model.eval()


def _loss_of(
    model: PreTrainedModel, labels: torch.Tensor, **inputs: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Mean loss of the tokens that are learnt, and the share of them that is the likeliest."""
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]  # (B, T - 1, H)
    learnt = labels[:, 1:] != -100
    head: Any = model.get_output_embeddings()
    logits = head(hidden[learnt]).float()  # (N, V)
    targets = labels[:, 1:][learnt]
    accuracy = (logits.detach().argmax(-1) == targets).float().mean()
    return torch.nn.functional.cross_entropy(logits, targets), float(accuracy)


def _arguments(out: Path, policy: Policy, config: WarmStartConfig) -> SFTConfig:
    from trl.trainer.sft_config import SFTConfig

    return SFTConfig(
        output_dir=str(out),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=max(1, config.steps // 20),
        max_length=None,
        train_sampling_strategy="group_by_length" if config.group_by_length else "random",
        bf16=choose_dtype(config.precision, policy.model.device.type) == "bfloat16",
        use_cpu=policy.model.device.type == "cpu",
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=max(1, config.steps // 20),
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=1,
        disable_tqdm=True,
        report_to="none",
        seed=config.seed,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
