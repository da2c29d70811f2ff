"""Finds stop strings in a stream of sampled tokens without decoding it whole at every step."""

from __future__ import annotations

from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agent.engines.base import Sampling


class _Stream(Protocol):
    """A completion under way, as much of it as the search for stop strings needs."""

    sampling: Sampling
    new_ids: list[int]
    tail: str


class StopFinder:
    """Matches on the text of single tokens first, and asks the tokenizer only about a candidate."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}

    def found(self, stream: _Stream, token: int) -> bool:
        """Return whether `token`, the last of `stream.new_ids`, completes one of its stop strings."""
        stops = stream.sampling.stop
        if not stops:
            return False
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = str(self._tokenizer.decode([token]))
        longest = max(map(len, stops))
        tail = stream.tail + piece
        # One character less than a stop string: a stop found earlier is not found again.
        stream.tail = tail[-(longest - 1) :] if longest > 1 else ""
        # A character that is cut in two decodes to U+FFFD on either side.
        if "\ufffd" not in tail and not any(stop in tail for stop in stops):
            return False
        # Alone, a token may decode without the space it has in context: the whole has the last word.
        text = str(self._tokenizer.decode(stream.new_ids[-4 * longest :]))
        return any(stop in text for stop in stops)


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a completion: those of the generation configuration, or the tokenizer's too."""
    configured: Any = getattr(model.generation_config, "eos_token_id", None)
    ids: list[Any] = configured if isinstance(configured, list) else [configured, tokenizer.eos_token_id]
    return {token for token in ids if token is not None}
