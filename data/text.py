"""Text made fit for tables, models and UTF-8.

JSON, file names and command lines carry halves of surrogate pairs, UTF-8 does not. Of a passage of megabytes
a model reads the first few hundred tokens, so it is cut before it is tokenised.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

_NO_NAME = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029\ufeff\ud800-\udfff]")
_ESCAPED_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
_CHARACTERS_A_TOKEN = 16  # four times as many as of English
_LEAST_MORE = 128  # a word of up to 100 characters has pieces, a longer one is unknown as a whole (WordPiece)


def is_unicode(text: str) -> bool:
    """Return whether it can be written as UTF-8: half a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def replace_halves(text: str) -> str:
    """Return the text with U+FFFD for each half, as a decoder has it for a broken byte."""
    return text if is_unicode(text) else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def name_of(path: str) -> str:
    """Return a path that every table can hold: control characters and bytes that are no UTF-8 escaped."""
    return _NO_NAME.sub(lambda found: ascii(found[0])[1:-1], path)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where there is not one.

    (1, "step") -> "1 step"; (1200, "query") -> "1,200 queries"; (2, "search") -> "2 searches"
    """
    ending = "" if number == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number:,} {re.sub('y$', 'ie', noun) if ending else noun}{ending}"


def one_i(lowered: str) -> str:
    """Return the text with one i: Turkish has it with and without a dot, and others type either as i."""
    return lowered.replace("i\u0307", "i").replace("ı", "i")


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], rule: str = "---:") -> str:
    """A table in Markdown; `rule` places what stands in all columns but the first."""
    lines = (columns, ["---", *[rule] * (len(columns) - 1)], *rows)
    cells = ([str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def replace_halves_in(value: Any, source: bytes) -> Any:
    """Return a JSON value, parsed from `source`, with the same done to all its strings and keys."""
    return _replaced(value) if _ESCAPED_HALF.search(source) else value


def _replaced(value: Any) -> Any:
    if isinstance(value, str):
        return replace_halves(value)
    if isinstance(value, list):
        return [_replaced(each) for each in value]
    if isinstance(value, dict):
        return {replace_halves(key): _replaced(each) for key, each in value.items()}
    return value


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
    """Cut a text for a tokenizer of transformers that reads the first `tokens` tokens; None reads all.

    Halves are replaced. (Of a tokenizer that cuts on the left, the last tokens are read.)
    """
    text = replace_halves(text)
    if tokens is None or getattr(tokenizer, "truncation_side", "left") == "left":
        return text
    return cut(
        text, tokens, lambda part: len(tokenizer(part, add_special_tokens=False, verbose=False).input_ids)
    )
