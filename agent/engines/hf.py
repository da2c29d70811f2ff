"""The `hf` engine: any transformers causal language model, on a CPU or one GPU.

Continuous batching over rows of one key-value cache. A trajectory owns a row from its first turn to
its release, so a turn only feeds what is new: the observation. Each step of the loop either
prefills the rows that wait with new tokens or decodes one token for all rows that write. Rows come
and go as trajectories do; the rows in use stay contiguous, so decoding reads the cache without a
copy. Runs inside the event loop's thread: between two steps every coroutine that can go on does.

Departure from `generate`: each row draws from its own generator by inverse transform of one uniform
number a token, so what a trajectory samples does not depend on who shares its batch. New weights may
come in the middle of a completion: it goes on with them.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from agent.engines.base import Completion, Engine, FinishReason, Sampling
from agent.engines.image_cache import Pictures, shared_with_pictures
from agent.engines.sampling import Request, TokenSampler
from agent.trajectory import Picture
from agent.vision import Vision
from data.errors import ConfigError, EngineError

logger = logging.getLogger(__name__)

CACHE_BLOCK_TOKENS = 256
"""The cache grows by this many positions at a time."""
LEAST_SHARED = 32
"""Tokens that two prompts must begin with alike for one to take them from the other's row."""
MOST_COMPARED = 8
"""Rows that a new prompt is compared with."""


@dataclass(eq=False)
class _Row:
    index: int
    cached_ids: list[int] = field(default_factory=list)
    pictures: tuple[Picture, ...] = ()


class RowCache(Cache):
    """Key-value rows of equal capacity, as many as were needed; a forward says which rows and positions.

    storage (layers, 2, rows, capacity + 1, key-value heads, head size); the last position is where
    padding is written, and nothing reads it.
    """

    def __init__(self, model: PreTrainedModel, max_rows: int) -> None:
        super().__init__(layers=[])
        config = model.config.get_text_config()
        head_dim = getattr(config, "head_dim", None) or (config.hidden_size // config.num_attention_heads)
        self._shape, self._max_rows = (config.num_hidden_layers, 2), max_rows
        self._heads = (getattr(config, "num_key_value_heads", None) or 1, head_dim)
        self.storage = torch.zeros(*self._shape, 0, 1, *self._heads, dtype=model.dtype, device=model.device)
        self.rows: slice | Tensor = slice(0, 0)
        self.positions = self.row_indices = torch.empty(0)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.storage.shape[3] - 1

    def reserve(self, rows: int, length: int) -> None:
        """Make room for `length` positions in `rows` rows. Rows are added by doubling, up to the most."""
        held = self.storage.shape[2]
        if rows > held or length > self.capacity:
            if rows > held:
                held = min(max(rows, 2 * held), self._max_rows)
            blocks = -(-max(length, self.capacity) // CACHE_BLOCK_TOKENS) * CACHE_BLOCK_TOKENS
            grown = self.storage.new_zeros(*self._shape, held, blocks + 1, *self._heads)
            grown[:, :, : self.storage.shape[2], : self.capacity] = self.storage[:, :, :, :-1]
            self.storage = grown

    def touch(self, rows: list[int], positions: Tensor, length: int) -> None:
        """Prepare a forward over `rows` (R,) writing at `positions` (R, T), reading `length`."""
        self.row_indices = torch.tensor(rows, device=positions.device)[:, None]
        self.rows = slice(0, len(rows)) if rows == list(range(len(rows))) else self.row_indices[:, 0]
        self.positions, self.length = positions, length

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        """Write (R, heads, T, size) at the touched positions; return keys and values read so far."""
        layer = self.storage[layer_idx]
        for kept, states in zip(layer, (key_states, value_states), strict=True):
            # Under autocast the states may be of another type than the weights.
            kept[self.row_indices, self.positions] = states.transpose(1, 2).to(kept.dtype)
        keys, values = layer[0][self.rows, : self.length], layer[1][self.rows, : self.length]
        return keys.transpose(1, 2), values.transpose(1, 2)

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int | None = None) -> None:
        self.storage[:, :, target, :length] = self.storage[:, :, source, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length


class HFEngine(Engine):
    """Serves many trajectories from one transformers model. See the head of this file."""

    shares_model = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_rows: int = 128,
        max_prefill_tokens: int = 16384,
        vision: Vision | None = None,
    ) -> None:
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if not kinds <= {"full_attention", "sliding_attention"}:
            raise ConfigError(
                f"engine hf: {model.config.model_type} has layers of kind {sorted(kinds)}; "
                "allowed: full_attention, sliding_attention"
            )
        self.model, self.tokenizer = model, tokenizer
        self.max_rows, self.max_prefill_tokens = max_rows, max_prefill_tokens
        self.max_length = getattr(config, "max_position_embeddings", None) or 1 << 30
        self.weights_version = 0
        self._window = config.sliding_window if "sliding_attention" in kinds else None
        self._cache = RowCache(model, max_rows)
        self._pictures = Pictures(model, vision) if vision else None
        self._rows: dict[str, _Row] = {}
        self._watchers: dict[str, Callable[[list[int]], None]] = {}
        self._waiting: deque[Request] = deque()  # for a row, or for their prefill
        self._writing: dict[int, Request] = {}  # by row index
        self._sampler = TokenSampler(model, tokenizer, self.max_length)
        self._task: asyncio.Task[None] | None = None
        self._prefill_due = 0

    async def generate(
        self, prompt_ids: list[int], sampling: Sampling, trajectory_id: str, pictures: Sequence[Picture] = ()
    ) -> Completion:
        """Continue the trajectory; only tokens that its row has not seen are fed."""
        if not prompt_ids:
            raise EngineError(f"{trajectory_id}: an empty prompt cannot be continued")
        if pictures and self._pictures is None:
            raise EngineError("engine hf: pictures for a policy that reads none")
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        uniform, shown = random.Random(sampling.seed), tuple(pictures)
        request = Request(trajectory_id, list(prompt_ids), sampling, future, uniform, shown)
        request.weights_version = self.weights_version
        if len(prompt_ids) >= self.max_length:
            return self._completion(request, FinishReason.LENGTH)
        self._waiting.append(request)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())
        return await future

    def watch(self, trajectory_id: str, tell: Callable[[list[int]], None]) -> None:
        self._watchers[trajectory_id] = tell

    async def release(self, trajectory_id: str) -> None:
        """Give the trajectory's row to the next one; the last row moves into the hole."""
        self._watchers.pop(trajectory_id, None)
        self._waiting = deque(r for r in self._waiting if r.trajectory_id != trajectory_id)
        row = self._rows.pop(trajectory_id, None)
        if row is None:
            return
        self._writing.pop(row.index, None)
        last = max(self._rows.values(), key=lambda r: r.index, default=row)
        if last.index > row.index:
            self._cache.copy(last.index, row.index)
            if last.index in self._writing:
                self._writing[row.index] = self._writing.pop(last.index)
            last.index = row.index

    async def update_weights(self, state: dict[str, Tensor] | None, version: int) -> None:
        """New weights from here on; None where the trainer changed this very model in place.

        What the old weights cached is forgotten: rows are fed anew, those that write at once. A completion
        under way keeps the version of its first token.
        """
        self._waiting.extendleft(self._writing[index] for index in sorted(self._writing, reverse=True))
        self._writing.clear()
        if state is not None:
            self.model.load_state_dict(state)
        self.weights_version = version
        if self._pictures:
            self._pictures.forget()
        for row in self._rows.values():
            row.cached_ids.clear()

    async def _run(self) -> None:
        try:
            while self._waiting or self._writing:
                with torch.inference_mode():
                    self._step()
                for _ in range(3):  # a reply from a server passes through several callbacks
                    await asyncio.sleep(0)
        except Exception as failure:
            logger.exception("the hf engine failed")
            error = EngineError(f"engine hf: {type(failure).__name__}: {failure}")
            error.__cause__ = failure
            for request in [*self._waiting, *self._writing.values()]:
                if not request.future.done():
                    request.future.set_exception(error)
            self._waiting.clear()
            self._writing.clear()

    def _step(self) -> None:
        ready = self._admit()
        # Prefills are collected for a few steps: one forward for many rows costs hardly more than for one.
        self._prefill_due += bool(ready)
        if ready and (not self._writing or len(ready) * 8 >= len(self._rows) or self._prefill_due > 4):
            self._prefill_due = 0
            self._prefill(ready)
        elif self._writing:
            self._decode()

    def _admit(self) -> list[Request]:
        """The waiting requests that have a row, giving free rows to the first that lack one."""
        ready = []
        for request in self._waiting:
            if request.future.done():  # its waiter was cancelled
                continue
            if request.trajectory_id not in self._rows and len(self._rows) < self.max_rows:
                self._rows[request.trajectory_id] = _Row(len(self._rows))
            if request.trajectory_id in self._rows:
                ready.append(request)
        return ready

    def _prefill(self, ready: list[Request]) -> None:
        """Feed what is new of these requests, shortest first, up to the token budget."""
        new = {id(r) for r in ready if not self._rows[r.trajectory_id].cached_ids and not r.pictures}
        ready = self._share_beginnings(ready, new)
        fresh = {}
        for request in ready:
            row = self._rows[request.trajectory_id]
            token_ids = request.token_ids
            shared = _common_prefix(row.cached_ids, token_ids[:-1])
            if row.pictures or request.pictures:
                shared = shared_with_pictures(shared, row.pictures, request.pictures)
            row.pictures = request.pictures
            del row.cached_ids[shared:]
            fresh[id(request)] = token_ids[shared:]
            if not request.new_ids:
                request.weights_version = self.weights_version
        ready = sorted(ready, key=lambda r: len(fresh[id(r)]))
        fits = [
            r
            for count, r in enumerate(ready, start=1)
            if count == 1 or count * len(fresh[id(r)]) <= self.max_prefill_tokens
        ]
        rows = [self._rows[r.trajectory_id] for r in fits]
        for request, row in zip(fits, rows, strict=True):
            self._waiting.remove(request)
            self._writing[row.index] = request
        # A group begins with the same prompt: it is fed once, and its part of the cache copied to the others.
        first: dict[Any, _Row] = {}
        same = {
            row.index: first.setdefault(tuple(fresh[id(request)]), row)
            for request, row in zip(fits, rows, strict=True)
            if id(request) in new
        }
        fed = [
            (row, fresh[id(r)]) for r, row in zip(fits, rows, strict=True) if same.get(row.index, row) is row
        ]
        copies = [(row, same[row.index]) for row in rows if same.get(row.index, row) is not row]
        self._forward([row for row, _ in fed], [ids for _, ids in fed], copies)

    def _share_beginnings(self, ready: list[Request], new: set[int]) -> list[Request]:
        """Copy to the rows of new requests what other rows hold of their prompts; return those to feed now.

        Instructions and examples stand at the head of every prompt: where no row holds them yet, the first
        request goes ahead and those that begin alike follow in the next step.
        """
        held = [row for row in self._rows.values() if row.cached_ids and not row.pictures][:MOST_COMPARED]
        ahead: list[int] = []
        now = []
        for request in ready:
            prompt = request.token_ids[:-1]
            if id(request) in new:
                shared, source = max(
                    ((_common_prefix(row.cached_ids, prompt), row) for row in held),
                    key=lambda found: found[0],
                    default=(0, None),
                )
                if source is not None and shared >= LEAST_SHARED:
                    row = self._rows[request.trajectory_id]
                    self._cache.reserve(len(self._rows), shared)
                    self._cache.copy(source.index, row.index, shared)
                    row.cached_ids = prompt[:shared]
                elif not ahead:
                    ahead = request.token_ids
                elif ahead != request.token_ids and _common_prefix(ahead, prompt) >= LEAST_SHARED:
                    continue
            now.append(request)
        return now

    def _decode(self) -> None:
        """One token for every row that writes; idle rows ride along unless they are the majority."""
        by_index = sorted(self._rows.values(), key=lambda r: r.index)
        if 2 * len(self._writing) < len(by_index):
            by_index = [row for row in by_index if row.index in self._writing]
        self._forward(
            by_index,
            [self._writing[r.index].new_ids[-1:] if r.index in self._writing else [] for r in by_index],
        )

    def _forward(
        self, rows: list[_Row], new: list[list[int]], copies: Sequence[tuple[_Row, _Row]] = ()
    ) -> None:
        """Feed `new` tokens to `rows`, left-padded; sample a token for those that were fed.

        copies: further rows, each with the one of `rows` that it is to be like.
        """
        order = sorted(range(len(rows)), key=lambda i: rows[i].index)
        rows, new = [rows[i] for i in order], [new[i] for i in order]
        width = max(map(len, new))
        starts = torch.tensor([len(row.cached_ids) for row in rows])
        counts = torch.tensor([len(ids) for ids in new])
        ends = starts + counts
        length = int(ends.max())
        self._cache.reserve(len(self._rows), length)
        offsets = torch.arange(width) - (width - counts[:, None])  # (R, T); negative is padding
        positions = starts[:, None] + offsets
        padding = offsets < 0
        device = self.model.device
        write_at = positions.masked_fill(padding, self._cache.capacity).to(device)
        positions = positions.masked_fill(padding, 0).to(device)
        input_ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in new], device=device)
        self._cache.touch([row.index for row in rows], write_at, length)
        inputs = {"input_ids": input_ids}
        if self._pictures:
            shown = [(len(r.cached_ids), end, r.pictures) for r, end in zip(rows, ends.tolist(), strict=True)]
            inputs = self._pictures.inputs(input_ids, shown)
        logits = self.model(
            **inputs,
            attention_mask=self._mask(positions, length),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]  # (R, V)
        for row, ids in zip(rows, new, strict=True):
            row.cached_ids += ids
        for row, source in copies:
            row.cached_ids = list(source.cached_ids)
            self._cache.copy(source.index, row.index, len(source.cached_ids))
        place = {row.index: i for i, row in enumerate(rows)}
        fed = [(row, i) for i, row in enumerate(rows) if new[i]]
        fed += [(row, place[source.index]) for row, source in copies]
        if len(fed) != len(rows) or copies:
            logits = logits[torch.tensor([i for _, i in fed], device=device)]
        self._sample([self._writing[row.index] for row, _ in fed], logits)

    def _mask(self, positions: Tensor, length: int) -> Tensor | dict[str, Tensor]:
        """Additive causal mask (R, 1, T, L); a dict by layer kind where a model has windows."""
        keys = torch.arange(length, device=positions.device)
        query = positions[:, None, :, None]
        dtype = self.model.dtype
        closed = torch.finfo(dtype).min
        zeros = torch.zeros((), dtype=dtype, device=positions.device)
        full = torch.where(keys <= query, zeros, closed)
        if self._window is None:
            return full
        near = torch.where(keys > query - self._window, full, closed)
        return {"full_attention": full, "sliding_attention": near}

    def _sample(self, requests: list[Request], logits: Tensor) -> None:
        for request, reason in zip(requests, self._sampler.extend(requests, logits), strict=True):
            if tell := self._watchers.get(request.trajectory_id):
                tell(request.new_ids)
            if reason is not None:
                del self._writing[self._rows[request.trajectory_id].index]
                if not request.future.done():
                    request.future.set_result(self._completion(request, reason))

    def _completion(self, request: Request, reason: FinishReason) -> Completion:
        return Completion(request.new_ids, request.logprobs, reason, request.weights_version)


def _common_prefix(a: list[int], b: list[int]) -> int:
    if b[: len(a)] == a:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
