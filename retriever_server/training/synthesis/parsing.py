"""Replies of language models -> fields: a ladder of ways to read JSON, and a reason where none fits.

Nothing is guessed: two objects that differ, a key given twice, a list where a text is due are rejected.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

MOST_CHARACTERS = 20_000
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_FENCE = re.compile(r"```[\w-]*\n(.*?)```", re.DOTALL)
_REFUSAL = re.compile(
    r"\W*(i['’]?m sorry|sorry,|i (cannot|can['’]?t|am unable|won['’]?t)|as an ai)\b", re.IGNORECASE
)
_LOOP = re.compile(r"(.{2,200}?)\1{5,}\s*\S{0,200}$", re.DOTALL)
_LABEL = re.compile(r"^\W*(?:query|question|search query|q)\s*\d*\W*:\s*", re.IGNORECASE)
_LEFT_OVER = re.compile(r"^(<[^<>]*>|\{\w*\}|\[[^\[\]]*\]|\.\.\.|…|string|n/?a|none|null)$", re.IGNORECASE)
_QUOTES = {'"': '"', "“": "”", "'": "'", "«": "»", "„": "“"}


class Unparsable(ValueError):
    """Says why a reply cannot be used, in few words that are the same for the same fault."""


def parse_fields(text: str, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, str]:
    """Return the fields of the one JSON object in a reply; `required` must be there and no empty texts.

    Read in this order: the whole reply, a fenced block, the first braces that match; each as JSON, then
    without commas at ends, then as a Python literal. Last, lines of "key: value". Raises Unparsable.
    """
    text = _checked(text)
    record = _object_in(text, required)
    if record is None:
        record = _labelled_lines(text, (*required, *optional))
    if record is None:
        raise Unparsable("cut off" if text.count("{") > text.count("}") else "no JSON object")
    found = {_key(key): value for key, value in record.items()}
    return {name: value for name in (*required, *optional) if (value := _text(found, name, name in required))}


def parse_line(text: str) -> str:
    """Return the one line of a reply, without a label and quotes around it. Raises Unparsable."""
    lines = [line.strip() for line in _checked(text).splitlines() if line.strip()]
    line = _unquoted(_LABEL.sub("", lines[0]))
    if lines[0].startswith(("{", "[", "```", "<")):
        raise Unparsable("no plain line")
    return _text({"query": line}, "query", True)


def parse_list(text: str) -> list[str]:
    """Return the texts of a JSON list, else of quoted strings or of bullets, each once. Raises Unparsable."""
    text = _checked(text)
    found: list[Any] = next((each for each in _values(text, "[") if isinstance(each, list)), [])
    found = found or re.findall(r"^\s*(?:[-*•]|\d+[.)])\s*(.+)$", text, re.MULTILINE)
    found = found or re.findall(r'"([^"\n]{3,})"', text)
    items = [_unquoted(each.strip()) for each in found if isinstance(each, str) and each.strip()]
    if not items:
        raise Unparsable("no list")
    return list(dict.fromkeys(items))


def _checked(text: str) -> str:
    """The reply after its thought; Unparsable where nothing, a refusal or a loop is left."""
    text = _THOUGHT.sub("", text).strip()
    if not text:
        raise Unparsable("empty")
    if text.startswith("<think>"):
        raise Unparsable("cut off")
    if len(text) > MOST_CHARACTERS:
        raise Unparsable("too long")
    if _REFUSAL.match(text):
        raise Unparsable("refusal")
    if _LOOP.search(text[-1500:]):
        raise Unparsable("repeats itself")
    return text


def _object_in(text: str, required: Sequence[str]) -> dict[str, Any] | None:
    """The object of a reply; one that only wraps another, or a list of one, is unwrapped."""
    found: list[dict[str, Any]] = []
    for value in _values(text, "{"):
        while isinstance(value, (list, dict)) and len(value) == 1:
            inner = next(iter(value.values() if isinstance(value, dict) else value))
            if not isinstance(inner, (dict, list)):
                break
            value = inner
        if isinstance(value, list) and len(value) > 1 and all(isinstance(each, dict) for each in value):
            raise Unparsable("several objects")
        if isinstance(value, dict) and value not in found:
            found.append(value)
    fitting = [each for each in found if set(map(_key, each)) & set(required)]
    if len(fitting) > 1:
        raise Unparsable("several objects")
    return (fitting or found or [None])[0]


def _values(text: str, opening: str) -> Iterator[Any]:
    """Read JSON: the whole, else the fenced blocks, else each span of brackets that match."""
    for pieces in ([text], _FENCE.findall(text), list(_balanced(text, opening))):
        values = [value for piece in pieces if (value := _read(piece)) is not None]
        if values:
            yield from values
            return


def _balanced(text: str, opening: str) -> Iterator[str]:
    """The outermost spans between brackets that match, strings left out of the count."""
    depth, start, quoted, escaped = 0, 0, False, False
    closing = {"{": "}", "[": "]"}[opening]
    for at, character in enumerate(text):
        if quoted:
            quoted = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"' and depth:
            quoted = True
        elif character == opening:
            start = at if not depth else start
            depth += 1
        elif character == closing and depth:
            depth -= 1
            if not depth:
                yield text[start : at + 1]


def _read(piece: str) -> Any:
    """An object or list out of JSON, of JSON with commas at ends, or of a Python literal; else None."""
    piece = piece.strip()
    for written in (piece, re.sub(r",\s*([}\]])", r"\1", piece)):
        try:
            value = json.loads(written, strict=False, object_pairs_hook=_unique)
            return value if isinstance(value, (dict, list)) else None
        except (json.JSONDecodeError, RecursionError):
            continue
    try:
        value = ast.literal_eval(piece)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, (dict, list)) else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [_key(key) for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise Unparsable("a key given twice")
    return dict(pairs)


def _labelled_lines(text: str, names: Sequence[str]) -> dict[str, str] | None:
    """Lines of "Query: ..." for each name; None where one stands there twice or none does."""
    if "{" in text:
        return None
    said = "|".join(re.escape(name).replace("_", "[ _]") for name in names)
    found = re.findall(rf"^\W*({said})\W*:[*\s]*(.+)$", text, re.IGNORECASE | re.MULTILINE)
    keys = [_key(key) for key, _ in found]
    if len(set(keys)) < len(keys):
        raise Unparsable("a key given twice")
    return {key: _unquoted(value.strip()) for key, (_, value) in zip(keys, found, strict=True)} or None


def _text(found: dict[str, Any], name: str, required: bool) -> str:
    if name not in found:
        if required:
            raise Unparsable(f"no {name}")
        return ""
    value = found[name]
    if not isinstance(value, str):
        raise Unparsable(f"{name} is no text")
    value = " ".join(value.split())
    if _LOOP.search(value[-1500:]):
        raise Unparsable("repeats itself")
    if required and not any(map(str.isalnum, value)):
        raise Unparsable(f"{name} is empty")
    if _LEFT_OVER.match(value):
        raise Unparsable(f"{name} is a placeholder")
    return value


def _key(key: Any) -> str:
    return re.sub(r"\W+", "_", str(key).strip().lower()).strip("_")


def _unquoted(text: str) -> str:
    text = text.strip().strip("*").strip()
    while len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:
        text = text[1:-1].strip()
    return text
