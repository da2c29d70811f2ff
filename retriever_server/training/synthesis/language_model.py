"""A causal language model that judges: log-probabilities of what follows a text."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from data.errors import ConfigError, first_line
from data.hub import find_model
from data.text import replace_halves


class CausalJudge:
    """Reads contexts that all begin with `prefix`, whose keys and values are computed once and kept."""

    def __init__(
        self, model: str, prefix: str, max_length: int, batch_size: int, device: str, dtype: str
    ) -> None:
        found = find_model(model, "model")
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(found)
            loaded: Any = AutoModelForCausalLM.from_pretrained(found, dtype=getattr(torch, dtype, "auto"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"model = {model!r}: no causal model loads from there ({first_line(error)})"
            ) from None
        self._model = loaded.to(device).eval()
        self._prefix = self.tokens(prefix)
        self.max_length, self.batch_size = max_length, batch_size
        self.tokens_read = 0
        with torch.inference_mode():
            self._cache: Any = DynamicCache(config=self._model.config)
            self._model(input_ids=torch.tensor([self._prefix], device=device), past_key_values=self._cache)

    def tokens(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return self._tokenizer(replace_halves(text), add_special_tokens=False)["input_ids"]

    def cut(self, text: str, room: int) -> str:
        """The first `room` tokens of a text."""
        ids = self.tokens(text[: 20 * room])
        return text if len(ids) <= room and len(text) <= 20 * room else self._tokenizer.decode(ids[:room])

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

    def differences(self, contexts: Sequence[str], yes: str, no: str) -> list[float]:
        """Log-probabilities of `yes` minus `no` after each context, of the first tokens that differ."""
        a, b = self.tokens(yes), self.tokens(no)
        same = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
        found = [0.0] * len(contexts)
        for chosen, logits in self._batches([self.tokens(each) + a[:same] for each in contexts], 1):
            for row, of in zip(chosen, logits[:, -1], strict=True):
                found[row] = (of[a[same]] - of[b[same]]).item()
        return found

    def _batches(self, rows: Sequence[list[int]], keep: int) -> Any:
        """(indices, logits (B, keep, V)) of batches of similar length."""
        import torch

        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            self.tokens_read += sum(len(rows[i]) for i in chosen)
            with torch.inference_mode():
                yield chosen, self._logits([rows[i] for i in chosen], keep)

    def _logits(self, rows: Sequence[list[int]], keep: int) -> Any:
        """Float logits (B, min(keep, T), V) of the last places; padded on the left, after the prefix."""
        import torch

        width, before, device = max(map(len, rows)), len(self._prefix), self._model.device
        ids = torch.zeros((len(rows), width), dtype=torch.long)  # (B, T)
        mask = torch.zeros_like(ids)
        for at, row in enumerate(rows):
            ids[at, width - len(row) :], mask[at, width - len(row) :] = torch.tensor(row), 1
        positions = before + (mask.cumsum(1) - 1).clamp(min=0)
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(len(rows))
        whole = torch.cat([torch.ones((len(rows), before), dtype=torch.long), mask], dim=1)
        return self._model(
            input_ids=ids.to(device), attention_mask=whole.to(device), position_ids=positions.to(device),
            past_key_values=cache, use_cache=True, logits_to_keep=min(keep, width),
        ).logits.float()  # fmt: skip
