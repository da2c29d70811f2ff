"""Text cut before it is tokenised: of a passage of megabytes a model reads the first few hundred tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_CHARACTERS_A_TOKEN = 16  # four times as many as of English
_LEAST_MORE = 128  # a word of up to 100 characters has pieces, a longer one is unknown as a whole (WordPiece)


def cut(text: str, tokens: int, count: Callable[[str], int]) -> str:
    """The beginning of a text, with about twice as many tokens as `tokens` or more; a shorter text is whole.

    count: tokens of a text. Where few tokens hold many characters (blanks, a word that is unknown as a whole)
    the beginning grows until there are enough, so that its first `tokens` tokens are those of the whole text.
    """
    enough = tokens + max(tokens, _LEAST_MORE)
    length = _CHARACTERS_A_TOKEN * enough
    while length < len(text) and count(text[:length]) < enough:
        length *= 8
    return text[:length]


def cut_for(tokenizer: Any, text: str, tokens: int | None) -> str:
    """Cut a text for a tokenizer of transformers that reads the first `tokens` tokens; None reads all."""
    if tokens is None or getattr(tokenizer, "truncation_side", "left") == "left":  # or it reads the last
        return text
    return cut(
        text, tokens, lambda part: len(tokenizer(part, add_special_tokens=False, verbose=False).input_ids)
    )
