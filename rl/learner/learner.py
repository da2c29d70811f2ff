"""A policy in training: the policy, its adapters, the critic, their optimisers; one step; all of it on disk.

A loss is averaged over the *global* batch, however it is cut into micro-batches and processes. Trajectories
whose advantages are zero have no gradient without a KL or entropy term: they are not fed through the model,
but stay in the denominator.

checkpoint/
  model.safetensors, config.json, ...   the policy as anybody loads it, adapters merged
  adapter.safetensors                   the adapters alone (LoRA)
  optimizer.safetensors                 moments and float32 copies
  critic/, critic_optimizer.safetensors with PPO
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from agent.trajectory import Segment, SegmentKind, StopReason, Trajectory
from agent.vision import text_trunk
from data.errors import ConfigError
from data.models.sharding import gather, layers_of, shard, whole
from data.records import Question
from rl.algorithm.answer_likelihood import probe_key, probes
from rl.algorithm.credit import TrainingBatch, assign_advantages
from rl.algorithm.losses import ScoredTokens, policy_loss, token_weights, value_loss
from rl.learner.batch import MicroBatch, micro_batches
from rl.learner.critic import Critic
from rl.learner.logprobs import Scorer, check_packing
from rl.learner.lora import (
    adapter_state,
    add_lora,
    copy_state,
    load_adapter_state,
    merged_state,
    scaled_adapter_state,
    training_dropout,
    without_adapters,
)
from rl.learner.optimizer import Optimizer
from rl.learner.workers import Totals, Workers

if TYPE_CHECKING:
    from agent.policy import Policy
    from agent.protocol import Protocol
    from rl.config import TrainConfig
    from rl.rollouts import Collected, Group

logger = logging.getLogger(__name__)

Snapshot = dict[str, dict[str, Tensor]]
"""Full tensors by part and name."""
Measure = Callable[[MicroBatch], Tensor]
"""A number for each trained token of a micro-batch (N,)."""
_NOTHING = Trajectory(
    Question("nothing", "", ()),
    [Segment(SegmentKind.PROMPT, [0], ""), Segment(SegmentKind.POLICY, [0], "", [None])],
    StopReason.ANSWERED,
)
"""Fed where a process has less to do than another, for its part in sharing out the weights."""


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
        """reference: the policy to stay near, where that is not this one without its adapters."""
        self.policy, self.config, self.protocol, self.workers = policy, config, protocol, workers
        self.model: PreTrainedModel = policy.model
        self.token_limit = (protocol.max_turns + 1) * protocol.max_response_tokens
        vision, algorithm = policy.vision, config.algorithm
        self.sharded = workers.count > 1 and config.sharding == "fsdp"
        if self.sharded and vision:  # a process that was shown no picture would hold up the others
            raise ConfigError("sharding = 'fsdp': not with a policy that reads pictures; allowed: none")
        if config.packing:
            check_packing(cast(PreTrainedModel, text_trunk(self.model.base_model)))
        add_lora(self.model, config.lora, config.seed)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.critic = Critic.from_policy(self.model, vision) if algorithm.needs_critic else None
        self.scorer = Scorer(self.model, config.rollout, vision=vision)
        near = reference and Scorer(reference.model, config.rollout, vision=vision)
        near = self.scorer if config.lora.rank else near
        if self.sharded:
            for module in {self.scorer, self.critic, near}:
                if module is not None:
                    _shard(module, config.dtype)
        self.reference = near if algorithm.needs_reference else None
        layers = [layer for each in (self.model, self.critic) if each for layer in layers_of(each)]
        self._recomputed = [layer for layer in layers if layer.gradient_checkpointing]
        self.optimizer = Optimizer(self.model, algorithm, algorithm.learning_rate, algorithm.warmup_steps)
        self.critic_optimizer = self.critic and Optimizer(
            self.critic, algorithm, algorithm.critic_learning_rate, algorithm.critic_warmup_steps
        )

    @property
    def half(self) -> bool:
        """Return whether it and its engine compute in half precision: weights shared out are float32 then."""
        dtype, cuda = self.config.dtype, self.model.device.type == "cuda"
        return dtype == "bfloat16" or (dtype == "auto" and cuda)

    def learn(self, collected: Collected, step: int) -> list[Totals]:
        """Update on what was collected for the step after `step`; nothing changes where that is nothing.

        Returns what each part of it measured.
        """
        if not collected.count:
            return []
        algorithm, groups = self.config.algorithm, collected.groups
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        rewards = [reward for group in groups for reward in group.rewards]
        batch = TrainingBatch(trajectories, rewards, self.model.device)
        self.optimizer.decay = min(1.0, (self.config.steps - step) / (algorithm.decay_steps + 1))
        torch.manual_seed((self.config.seed * 1_000_003 + step) % 2**63)  # of LoRA's dropout
        dropout = training_dropout(self.model) if self.config.lora.rank else nullcontext()
        with dropout, _recomputing(self._recomputed):
            self._score(batch)
            started = time.monotonic()
            measured = [assign_advantages(batch, self.config, self.workers, self.token_limit, self._decode)]
            measured.append({"time/advantages_seconds": (time.monotonic() - started, 1.0)})
            for part in range(algorithm.updates_per_rollout):
                rows = _share(groups, part, algorithm.updates_per_rollout, collected.count)
                if self.critic is None or step >= algorithm.critic_only_steps:
                    measured += self._update_policy(batch, rows)
                if self.critic is not None:
                    measured += self._update_critic(self.critic, batch, rows)
        for name in ("policy/clamped_fraction", "policy/kl_clamped_fraction"):
            counts = [part[name] for part in measured if name in part]
            if any(beyond for beyond, _ in counts):
                beyond, tokens = map(sum, zip(*counts, strict=True))
                logger.warning("%d of %d tokens have a log-ratio beyond its bound (%s)", beyond, tokens, name)
        return measured

    @torch.no_grad()
    def _score(self, batch: TrainingBatch) -> None:
        """Add what must be known of the batch before the first update changes the policy."""
        algorithm, reference = self.config.algorithm, self.reference
        if algorithm.updates_per_rollout > 1 or (reference and algorithm.kl_in == "reward"):
            batch.columns["old"] = self._measured(batch, self._logprobs)
        if reference is not None:
            with without_adapters(reference.model) if self.config.lora.rank else nullcontext():
                if algorithm.kl_coefficient:
                    batch.columns["reference"] = self._measured(batch, lambda each: reference(each).logprobs)
                if algorithm.advantage == "answer_likelihood":
                    batch.columns["answer"] = self._answer_logprobs(batch, reference)
        if self.critic is not None:
            batch.columns["values"] = self._measured(batch, self.critic)

    def _measured(self, batch: TrainingBatch, measure: Measure) -> list[Tensor]:
        """Return one tensor (tokens,) a trajectory."""
        found: dict[int, Tensor] = {}
        for each in self._micro_batches(batch, range(len(batch.trajectories))):
            parts = measure(each).split(each.counts.tolist())
            found.update(zip(each.rows, parts, strict=bool(each.rows)))
        return [found[row] for row in range(len(batch.trajectories))]

    def _answer_logprobs(self, batch: TrainingBatch, reference: Scorer) -> list[Tensor]:
        """The reference's mean log-prob of the gold answer before each turn: (turns,) a trajectory."""
        encode = partial(self.policy.tokenizer.encode, add_special_tokens=False)
        asked = [probes(each, self.protocol, encode) for each in batch.trajectories]
        keyed = {probe_key(probe): probe for each in asked for probe in each}  # a group shares its prompt
        alone = TrainingBatch(list(keyed.values()), (), batch.device)
        scored = self._measured(alone, lambda each: reference(each).logprobs)
        means = dict(zip(keyed, (each.mean() for each in scored), strict=True))
        nothing = torch.empty(0, device=batch.device)
        return [torch.stack([means[probe_key(p)] for p in each]) if each else nothing for each in asked]

    def _update_policy(self, batch: TrainingBatch, rows: Sequence[int]) -> list[Totals]:
        """Update the policy once on its share of the batch; return what was measured."""
        algorithm, advantages = self.config.algorithm, batch.columns["advantages"]
        tokens, trajectories = self._everywhere(sum(len(advantages[row]) for row in rows), len(rows))
        kl_in_loss = "reference" in batch.columns and algorithm.kl_in == "loss"
        always = kl_in_loss or algorithm.entropy_coefficient > 0 or algorithm.llds_coefficient > 0
        fed = [row for row in rows if always or advantages[row].any()]
        if not self._everywhere(len(fed))[0]:
            return []
        constant = algorithm.averaging_tokens or self.token_limit
        measured: list[Totals] = []

        def loss_of(each: MicroBatch) -> Tensor:
            taken = self.scorer(each, entropy_gradient=algorithm.entropy_coefficient > 0)
            scored = ScoredTokens(
                taken.logprobs,
                batch.joined("old", each.rows) if "old" in batch.columns else taken.logprobs.detach(),
                batch.joined("advantages", each.rows),
                each.row.to(batch.device),
                taken.entropy,
                each.sampler_logprobs.to(batch.device),
                each.sampled.to(batch.device),
                batch.joined("reference", each.rows) if kl_in_loss else None,
                batch.joined("turns", each.rows).long() if "turns" in batch.columns else None,
            )
            loss, totals = policy_loss(scored, algorithm)
            measured.append(totals)
            weights = token_weights(algorithm.averaging, each.counts, tokens, trajectories, constant)
            return (weights.to(loss.device) * loss).sum()

        loss = self._accumulate(batch, fed, loss_of, self._logprobs)
        norm = self._apply(self.scorer, self.optimizer)
        return [*measured, {"policy/loss": (loss, 1 / self.workers.count), "policy/grad_norm": (norm, 1)}]

    def _update_critic(self, critic: Critic, batch: TrainingBatch, rows: Sequence[int]) -> list[Totals]:
        """Update the critic once: its values of policy tokens towards their returns."""
        assert self.critic_optimizer is not None
        (tokens,) = self._everywhere(sum(len(batch.columns["returns"][row]) for row in rows))
        if not tokens:
            return []

        def loss_of(each: MicroBatch) -> Tensor:
            old, returns = (batch.joined(name, each.rows) for name in ("values", "returns"))
            return value_loss(critic(each), old, returns, self.config.algorithm.value_clip).sum() / tokens

        loss = self._accumulate(batch, rows, loss_of, critic)
        norm = self._apply(critic, self.critic_optimizer)
        return [{"critic/loss": (loss, 1 / self.workers.count), "critic/grad_norm": (norm, 1)}]

    def _accumulate(
        self, batch: TrainingBatch, rows: Sequence[int], loss_of: Measure, idle: Measure
    ) -> float:
        """Add up the gradients of these rows and return their loss. `idle` takes part without any."""
        total = 0.0
        # FSDP averages gradients over the processes, where the loss is a share of the global average.
        scale = self.workers.count if self.sharded else 1
        for each in self._micro_batches(batch, rows):
            loss = loss_of(each) if each.rows else idle(each).sum() * 0
            if not loss.isfinite():  # its gradient may be: as it is now, no process takes this update
                loss = loss * torch.nan
            (loss * scale).backward()
            total += float(loss.detach())
        return total

    def _apply(self, module: nn.Module, optimizer: Optimizer) -> float:
        """Let the optimiser take the accumulated gradient of all processes; returns its norm."""
        if not self.sharded:
            self.workers.sum_gradients(p for p in module.parameters() if p.requires_grad)
        return optimizer.update()

    def preserve(self, coefficient: float) -> None:
        """Hold on to the likelihood of what was not bad (LLDS), from the next update on."""
        algorithm = replace(self.config.algorithm, llds_coefficient=coefficient)
        self.config = replace(self.config, algorithm=algorithm)

    def _decode(self, token_ids: list[int]) -> str:
        return str(self.policy.tokenizer.decode(token_ids, skip_special_tokens=False))

    def _logprobs(self, each: MicroBatch) -> Tensor:
        return self.scorer(each).logprobs

    def _everywhere(self, *counts: int) -> list[int]:
        """Sum counts over the processes."""
        return [int(total) for total in self.workers.sum(torch.tensor(counts, dtype=torch.float64))]

    def _micro_batches(self, batch: TrainingBatch, rows: Sequence[int]) -> Iterator[MicroBatch]:
        """Cut the rows into micro-batches; where weights are shared out, as many as any process has."""
        config, all_tokens = self.config, not self.config.mask_observations
        cut = list(
            micro_batches(batch.trajectories, rows, config.micro_batch_tokens, config.packing, all_tokens)
        )
        if self.sharded:  # agreed on before the first of them, for every pass asks all processes
            idle = replace(next(micro_batches([_NOTHING], [0], 2)), rows=[])
            cut += [idle] * (max(self.workers.gather(len(cut))) - len(cut))
        yield from cut

    def weights_for_engine(self) -> dict[str, Tensor]:
        """The whole policy, which all processes must ask for.

        With `engine.lora: adapter` its adapters alone. For servers the leading process alone has it.
        """
        engine, state = self.config.engine, self.model.state_dict()
        if engine.shares_model:
            return merged_state(self.model, {n: whole(w) for n, w in state.items()})
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


def _share(groups: Sequence[Group], number: int, parts: int, count: int) -> list[int]:
    """The rows of the number-th of `parts` equal shares of all processes' `count` groups."""
    numbers = [group.number for group in groups for _ in group.trajectories]
    return [row for row, group in enumerate(numbers) if group * parts // count == number]


def _shard(module: nn.Module, dtype: str) -> None:
    """Share out a module's weights; they stay in float32, and are computed with in `dtype`."""
    half = torch.bfloat16 if dtype == "bfloat16" or (dtype == "auto" and torch.cuda.is_available()) else None
    shard(module, half)


@contextmanager
def _recomputing(layers: Sequence[nn.Module]) -> Generator[None]:
    """Let these layers recompute their activations.

    They do so in training mode only, which would cost the engine its cache and everyone dropout: so
    the layers alone are in it, and only now.
    """
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
