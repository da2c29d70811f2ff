"""What training changes, in one place: the policy, its adapters, the critic, their optimisers; and all of
it on disk as plain safetensors.

checkpoint/
  model.safetensors, config.json, ...   the policy as anybody loads it, adapters merged
  adapter.safetensors                   the adapters alone (LoRA)
  optimizer.safetensors                 moments and float32 copies
  critic/, critic_optimizer.safetensors with PPO
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from agent.vision import text_trunk
from data.errors import ConfigError
from rl.learner.critic import Critic
from rl.learner.logprobs import Scorer
from rl.learner.lora import (
    adapter_state,
    add_lora,
    copy_state,
    load_adapter_state,
    merged_state,
    scaled_adapter_state,
    training_dropout,
)
from rl.learner.optimizer import Optimizer
from rl.learner.packing import check_packing
from rl.learner.update import Updater
from rl.learner.workers import Workers, gather, shard, whole

if TYPE_CHECKING:
    from agent.policy import Policy
    from agent.protocol import Protocol
    from rl.config import TrainConfig
    from rl.rollouts import Collected, Totals

Snapshot = dict[str, dict[str, Tensor]]
"""Full tensors by part and name."""


class Learner:
    """A policy in training. With `sharding: fsdp` it is not the model that the engine samples from."""

    def __init__(
        self,
        policy: Policy,
        config: TrainConfig,
        protocol: Protocol,
        workers: Workers,
        reference: Policy | None = None,
    ) -> None:
        self.policy, self.config, self.protocol, self.workers = policy, config, protocol, workers
        self.model: PreTrainedModel = policy.model
        vision = policy.vision
        self.sharded = workers.count > 1 and config.sharding == "fsdp"
        if self.sharded and vision:  # a process that was shown no picture would hold up the others
            raise ConfigError("sharding = 'fsdp': not with a policy that reads pictures; allowed: none")
        if config.packing:
            check_packing(cast(PreTrainedModel, text_trunk(self.model.base_model)))
        add_lora(self.model, config.lora, config.seed)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.critic = Critic.from_policy(self.model, vision) if config.algorithm.needs_critic else None
        self.scorer = Scorer(self.model, config.rollout, vision=vision)
        near = reference and Scorer(reference.model, config.rollout, vision=vision)
        kept_near = self.scorer if config.lora.rank else near
        if self.sharded:
            for module in {self.scorer, self.critic, kept_near} - {None}:
                _shard(module, config.dtype)
        algorithm = config.algorithm
        self.optimizer = Optimizer(self.model, algorithm, algorithm.learning_rate, algorithm.warmup_steps)
        self.critic_optimizer = self.critic and Optimizer(
            self.critic, algorithm, algorithm.critic_learning_rate, algorithm.critic_warmup_steps
        )
        self.updater = Updater(
            self.scorer,
            self.optimizer,
            config,
            workers,
            (kept_near or None) if config.algorithm.kl_coefficient else None,
            self.critic,
            self.critic_optimizer,
            (protocol.max_turns + 1) * protocol.max_response_tokens,
        )

    @property
    def half(self) -> bool:
        """Whether it and its engine compute in half precision: weights shared out are float32 then."""
        dtype, cuda = self.config.dtype, self.model.device.type == "cuda"
        return dtype == "bfloat16" or (dtype == "auto" and cuda)

    def learn(self, collected: Collected, step: int) -> Totals:
        """Update on what was collected for the step after `step`; nothing changes where that is nothing."""
        if not collected.count:
            return {}
        torch.manual_seed((self.config.seed * 1_000_003 + step) % 2**63)  # of LoRA's dropout
        with ExitStack() as stack:
            stack.enter_context(training_dropout(self.model))
            for module in (self.model, self.critic) if self.critic else (self.model,):
                stack.enter_context(_recomputing(module))
            return self.updater.update(collected.groups, collected.count, step)

    def weights_for_engine(self) -> dict[str, Tensor] | None:
        """The whole policy, which all processes must ask for; None where the engine shares the model.

        With `engine.lora: adapter` its adapters alone. For servers the leading process alone has it.
        """
        engine, state = self.config.engine, self.model.state_dict()
        if engine.shares_model:
            return merged_state(self.model, {n: whole(w) for n, w in state.items()}) if self.sharded else None
        if engine.lora == "adapter":
            return scaled_adapter_state(self.model)
        held = gather(state, self.workers.leads, on_host=engine.transport == "folder")
        return merged_state(self.model, held)

    def snapshot(self) -> Snapshot:
        """All state for the leading process, and empty parts for others; all processes must ask for it.

        Tensors that are not shared out are not copied; others are whole in host memory alone.
        """
        leads = self.workers.leads
        state = gather(self.model.state_dict(), leads)
        parts = {
            "policy": merged_state(self.model, state),
            "optimizer": gather(self.optimizer.state(), leads),
        }
        if self.config.lora.rank:
            parts["adapter"] = {name: state[name] for name in adapter_state(self.model) if name in state}
        if self.critic is not None and self.critic_optimizer is not None:
            parts["critic"] = gather(self.critic.state_dict(), leads)
            parts["critic_optimizer"] = gather(self.critic_optimizer.state(), leads)
        return parts

    def write(self, folder: Path, parts: Snapshot) -> None:
        """Put a snapshot into a folder; it is a policy folder, too."""
        self.policy.save(folder, self.protocol, parts["policy"])
        for name in ("adapter", "optimizer", "critic_optimizer"):
            if name in parts:
                save_file(parts[name], folder / f"{name}.safetensors")
        if self.critic is not None:
            self.critic.save(folder / "critic", parts["critic"])

    def read(self, folder: Path) -> None:
        """Take over what `write` wrote, which all processes must do."""
        if self.config.lora.rank:
            load_adapter_state(self.model, load_file(folder / "adapter.safetensors"))
        else:
            found = type(self.model).from_pretrained(folder, dtype=self.model.dtype).state_dict()
            copy_state(self.model.state_dict(), found, f"{folder}: another policy")
        self.optimizer.load_state(load_file(folder / "optimizer.safetensors"))
        if self.critic is not None and self.critic_optimizer is not None:
            self.critic.load(folder / "critic")
            self.critic_optimizer.load_state(load_file(folder / "critic_optimizer.safetensors"))


def _layers(module: nn.Module) -> list[Any]:
    return [each for each in module.modules() if isinstance(each, GradientCheckpointingLayer)]


def _shard(module: nn.Module, dtype: str) -> None:
    """Share out a module's weights; they stay in float32, and are computed with in `dtype`."""
    half = torch.bfloat16 if dtype == "bfloat16" or (dtype == "auto" and torch.cuda.is_available()) else None
    shard(module, _layers(module), half)


@contextmanager
def _recomputing(module: nn.Module) -> Iterator[None]:
    """Let layers recompute their activations, where gradient checkpointing is on.

    They do so in training mode only, which would cost the engine its cache and everyone dropout: so
    the layers alone are in it, and only now.
    """
    layers = [layer for layer in _layers(module) if layer.gradient_checkpointing]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
