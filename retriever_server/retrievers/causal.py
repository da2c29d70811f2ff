"""A causal language model that judges texts by the log-probabilities of what follows them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from data.errors import ConfigError, first_line
from data.machine.device import choose_dtype
from data.models.hub import find_model
from data.text import cut, replace_halves

_Loaded = TypeVar("_Loaded")


def load_or_refuse(model: str, load: Callable[[], _Loaded]) -> _Loaded:
    """Return what `load` loads; ConfigError where there is no such model."""
    try:
        return load()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model = {model!r}: no such model loads from there ({first_line(error)})"
        ) from error


class CausalJudge:
    """Reads texts in batches of similar length; keys and values of a common `prefix` are computed once."""

    def __init__(
        self, model: str, prefix: str = "", batch_size: int = 16, device: str = "cpu", dtype: str = "auto"
    ) -> None:
        """Raises ConfigError where no causal language model loads."""
        found = find_model(model, "model")
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        chosen = choose_dtype(dtype, device)
        self.tokenizer: Any = load_or_refuse(model, lambda: AutoTokenizer.from_pretrained(found))
        loaded: Any = load_or_refuse(model, lambda: AutoModelForCausalLM.from_pretrained(found, dtype=chosen))
        self.model, self.batch_size = loaded.to(device).eval(), batch_size
        self._prefix, self._cache = self.tokens(prefix), None
        if self._prefix:
            with torch.inference_mode():
                self._cache = DynamicCache(config=loaded.config)
                self.model(input_ids=torch.tensor([self._prefix], device=device), past_key_values=self._cache)

    def tokens(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return self.tokenizer(replace_halves(text), add_special_tokens=False)["input_ids"]

    def cut(self, text: str, room: int) -> str:
        """The first `room` tokens of a text."""
        ids = self.tokens(cut(text, room, lambda part: len(self.tokens(part))))
        return text if len(ids) <= room else self.tokenizer.decode(ids[:room])

    def mean_logprobs(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Mean log-probability of the tokens of each span after the prefix and its context."""
        rows = [(self.tokens(context), self.tokens(span)) for context, span in pairs]
        longest = max((len(span) for _, span in rows), default=0)
        found = [0.0] * len(rows)
        for chosen, logits in self._batches([context + span for context, span in rows], longest + 1):
            for row, of in zip(chosen, logits.log_softmax(-1), strict=True):
                span = rows[row][1]
                at = of[-len(span) - 1 : -1]  # each token is told by the place before it
                found[row] = at[range(len(span)), span].mean().item()
        return found

    def differences(self, rows: Sequence[list[int]], yes: int, no: int) -> list[float]:
        """Log-probability of the token `yes` minus that of `no` after each row of ids."""
        found = [0.0] * len(rows)
        for chosen, logits in self._batches(rows, 1):
            for row, of in zip(chosen, logits[:, -1], strict=True):
                found[row] = (of[yes] - of[no]).item()
        return found

    def _batches(self, rows: Sequence[list[int]], keep: int) -> Iterator[tuple[list[int], Any]]:
        """(indices, logits (B, keep, V)) of batches of similar length."""
        import torch

        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            with torch.inference_mode():
                yield chosen, self._logits([rows[i] for i in chosen], keep)

    def _logits(self, rows: Sequence[list[int]], keep: int) -> Any:
        """Float logits (B, min(keep, T), V) of the last places; padded on the left, after the prefix."""
        import torch

        width, before, device = max(map(len, rows)), len(self._prefix), self.model.device
        ids = torch.zeros((len(rows), width), dtype=torch.long)  # (B, T)
        mask = torch.zeros_like(ids)
        for at, row in enumerate(rows):
            ids[at, width - len(row) :], mask[at, width - len(row) :] = torch.tensor(row), 1
        positions = before + (mask.cumsum(1) - 1).clamp(min=0)
        whole = torch.cat([torch.ones((len(rows), before), dtype=torch.long), mask], dim=1)
        cached = copy.deepcopy(self._cache)
        if cached is not None:
            cached.batch_repeat_interleave(len(rows))
        return self.model(
            input_ids=ids.to(device), attention_mask=whole.to(device), position_ids=positions.to(device),
            past_key_values=cached, use_cache=cached is not None, logits_to_keep=min(keep, width),
        ).logits.float()  # fmt: skip
