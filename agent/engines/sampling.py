"""The next token of each completion: drawn from logits by a uniform number of its row, and the last or not.

Stop strings are found in the stream of sampled tokens without decoding it whole at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from agent.engines.base import Completion, FinishReason, Sampling

if TYPE_CHECKING:
    import asyncio
    import random

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from agent.trajectory import Picture


@dataclass(eq=False)
class Request:
    """One completion under way."""

    trajectory_id: str
    token_ids: list[int]
    """Tokens of the prompt, and all that were drawn after it."""
    sampling: Sampling
    future: asyncio.Future[Completion]
    uniform: random.Random
    pictures: tuple[Picture, ...] = ()
    tail: str = ""
    """Text at the end that may begin a stop string."""
    new_ids: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    weights_version: int = 0


class TokenSampler:
    """Draws the next token of completions, and tells which of them end with it."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        """max_length: tokens of a prompt and its completion."""
        self._stops, self._eos = StopFinder(tokenizer), eos_ids(model, tokenizer)
        self._max_length = max_length

    def extend(self, requests: Sequence[Request], logits: Tensor) -> list[FinishReason | None]:
        """Add a token to each completion from logits (R, V); return why it ends, None where it goes on."""
        samplings, uniforms = [r.sampling for r in requests], [r.uniform.random() for r in requests]
        tokens, logprobs = draw(logits.float(), samplings, uniforms)
        for request, token, logprob in zip(requests, tokens, logprobs, strict=True):
            request.new_ids.append(token)
            request.token_ids.append(token)
            request.logprobs.append(logprob)
        return [self._finished(*each) for each in zip(requests, tokens, strict=True)]

    def _finished(self, request: Request, token: int) -> FinishReason | None:
        if token in self._eos or self._stops.found(request, token):
            return FinishReason.STOP
        full = len(request.token_ids) >= self._max_length
        if full or len(request.new_ids) >= request.sampling.max_tokens:
            return FinishReason.LENGTH
        return None


def draw(logits: Tensor, samplings: list[Sampling], uniforms: list[float]) -> tuple[list[int], list[float]]:
    """A token a row by inverse transform of its uniform number, and its log-prob.

    logits (R, V); the log-prob is under the row's temperature (1 where it is greedy), before top-k and
    top-p unless the row asks to renormalise.
    """
    device = logits.device
    temperature = torch.tensor([s.temperature or 1.0 for s in samplings], device=device)
    logprobs = torch.log_softmax(logits / temperature[:, None], dim=-1)
    left = torch.ones(len(samplings), device=device)  # the mass that top-k and top-p leave
    if all(s.temperature == 0 for s in samplings):
        tokens = logits.argmax(-1)
    else:
        weights = logprobs.exp()
        if any(s.top_p < 1 or s.top_k for s in samplings):
            kept = kept_tokens(weights, [s.top_k for s in samplings], [s.top_p for s in samplings])
            weights = weights * kept
        totals = weights.cumsum(-1, dtype=torch.float64)
        targets = torch.tensor(uniforms, dtype=torch.float64, device=device) * totals[:, -1]
        tokens = torch.searchsorted(totals, targets[:, None], right=True)[:, 0]
        greedy = torch.tensor([s.temperature == 0 for s in samplings], device=device)
        tokens = torch.where(greedy, logits.argmax(-1), tokens.clamp(max=logits.shape[1] - 1))
        renormalised = torch.tensor([s.renormalise for s in samplings], device=device)
        left = torch.where(renormalised, totals[:, -1], 1.0).to(logprobs.dtype)
    taken = logprobs.gather(1, tokens[:, None])[:, 0] - left.log()
    return tokens.tolist(), taken.tolist()


def kept_tokens(probabilities: Tensor, top_k: list[int], top_p: list[float]) -> Tensor:
    """Return the tokens that top-k (0: all) and top-p keep, bool (R, V); one value a row, or one for all."""
    size, device = probabilities.shape[1], probabilities.device
    most = torch.tensor([k or size for k in top_k], device=device)
    mass = torch.tensor(top_p, device=device)
    ranked, order = probabilities.sort(dim=-1, descending=True)
    before = ranked.cumsum(-1) - ranked  # mass of the better ones: the first is always kept
    kept = (torch.arange(size, device=device) < most[:, None]) & (before < mass[:, None])
    return torch.zeros_like(kept).scatter(1, order, kept)


class StopFinder:
    """Matches on the text of single tokens first, and asks the tokenizer only about a candidate."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}

    def found(self, request: Request, token: int) -> bool:
        """Return whether `token`, the last of `request.new_ids`, completes one of its stop strings."""
        stops = request.sampling.stop
        if not stops:
            return False
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = str(self._tokenizer.decode([token]))
        longest = max(map(len, stops))
        tail = request.tail + piece
        # One character less than a stop string: a stop found earlier is not found again.
        request.tail = tail[-(longest - 1) :] if longest > 1 else ""
        # A character that is cut in two decodes to U+FFFD on either side.
        if "\ufffd" not in tail and not any(stop in tail for stop in stops):
            return False
        # Alone, a token may decode without the space it has in context: the whole has the last word.
        text = str(self._tokenizer.decode(request.new_ids[-4 * longest :]))
        return any(stop in text for stop in stops)


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a completion: those of the generation configuration, or the tokenizer's too."""
    configured: Any = getattr(model.generation_config, "eos_token_id", None)
    ids: list[Any] = configured if isinstance(configured, list) else [configured, tokenizer.eos_token_id]
    return {token for token in ids if token is not None}
