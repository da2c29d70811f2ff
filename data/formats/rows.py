"""Values as files hold them, in one form: ids, texts, lists, gold answers, numbers.

An id may be a number, a list may be one string or the JSON of a list, a whole number may come as 1912.0 and
a list as an array of numpy's. NaN and Infinity are no values: they are refused wherever they are read.
All functions raise ValueError, which says what is wrong with the value.
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

from data.pages.modalities import modalities
from data.records import Passage, split_contents
from data.text import replace_halves_in

_OTHER_TYPES = ("as_py", "to_pylist", "tolist", "isoformat")  # of pyarrow, numpy, dates
_PLAIN = (str, int, bool, type(None))
_MAX_LITERAL_CHARS = 100_000
_STRING = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_PYTHON_LIST = re.compile(rf"\[\s*{_STRING}\s*(?:,\s*{_STRING}\s*)*,?\s*\]", re.DOTALL)


def plain(value: Any) -> Any:
    """The value in the types of JSON: scalars and arrays of numpy and pyarrow, decimals, dates."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    for method in _OTHER_TYPES:
        if hasattr(value, method):
            value = getattr(value, method)()
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float | Decimal):
        if not math.isfinite(value):
            raise ValueError(f"{value}, which is no value")
        return int(value) if isinstance(value, Decimal) and value == int(value) else float(value)
    return value


def id_of(value: Any, name: str = "id") -> str:
    """An id as text, "" where there is none.   0 -> "0", 7.0 -> "7", "a b" -> "a b", null and " " -> "" """
    if type(value) is not str:
        value = _whole(_plain(value, name))
        if value is None:
            return ""
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ValueError(f'"{name}" must be a string, found {shown(value)}')
        value = str(value)
    return value if value.strip() else ""


def needed_id(value: Any, name: str = "id") -> str:
    """Return an id as `id_of` does; ValueError where there is none."""
    if not (id_ := id_of(value, name)):
        raise ValueError(f'no "{name}"')
    return id_


def ids_of(value: Any, name: str) -> tuple[str, ...]:
    """A list of ids; one alone stands for itself.   "13" -> ("13",), [1, "b"] -> ("1", "b")"""
    ids = tuple(id_of(each, name) for each in list_of(value, name))
    if not all(ids):
        raise ValueError(f'"{name}" holds an empty id')
    return ids


def text_of(value: Any, name: str) -> str:
    """A text, "" for null."""
    value = value if isinstance(value, str) else _plain(value, name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f'"{name}" must be a string, found {shown(value)}')
    return value or ""


def list_of(value: Any, name: str) -> list[Any]:
    """The items of a list, of a string that holds one as JSON, or what stands there alone.

    null and " " -> []
    """
    value = _plain(value, name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    held = _plain(_held_list(value), name)
    return held if held is not None else value if isinstance(value, list) else [value]


def answers_of(value: Any, name: str = "golden_answers") -> tuple[str, ...]:
    """Gold answers, each once: a list, one alone, {"target": ...} of Search-R1, {"text": [...]} of SQuAD,
    {"value", "aliases"} of TriviaQA.

    ["Rome", "Rome ", ""] -> ("Rome",), 1912.0 -> ("1912",), '["Lyon", "Lugdunum"]' -> ("Lyon", "Lugdunum")
    In a list, too, a string that holds a list of strings stands for these.
    """
    held = _held_object(value)
    if isinstance(held, Mapping) and (held is value or {"target", "text"} & held.keys()):
        aliases = [first_of(held, "value", "Value"), *list_of(first_of(held, "aliases", "Aliases"), name)]
        value = first_of(held, "target", "text") or [each for each in aliases if each is not None]
    answers = []
    for each in list_of(value, name):
        held = _held_list(each) or [each]
        answers += held if all(isinstance(item, str) for item in held) else [each]
    return tuple(dict.fromkeys(filter(None, map(_answer, answers))))


def number_of(value: Any, name: str) -> float:
    """A number, also as text."""
    value = _plain(value, name)
    try:
        if isinstance(value, int | float | str) and math.isfinite(number := float(value)):
            return number
    except (ValueError, OverflowError):
        pass
    raise ValueError(f'"{name}" must be a number, found {shown(value)}')


def scores_of(value: Any, ids: Iterable[str], name: str) -> dict[str, float]:
    """The score of each id, from a list of as many; none from an empty one."""
    values, ids = list_of(value, name), list(ids)
    if values and len(values) != len(ids):
        raise ValueError(f"{len(values)} scores for {len(ids)} passages")
    return {id_: number_of(each, name) for id_, each in zip(ids, values, strict=False)}


def object_of(value: Any, name: str) -> dict[str, Any]:
    """An object, such as metadata, or a string that holds one as JSON or Python writes it; {} for null."""
    value = _plain(_held_object(value), name)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f'"{name}" must be an object, found {shown(value)}')
    return value or {}


_WORDS = frozenset(("id", "_id", "docid", "title", "text", "contents", "metadata"))


def parse_passage(record: Mapping[str, Any]) -> Passage:
    """The passage in one record of a corpus; ValueError says what is wrong with it.

    The id may be called _id as in BEIR or docid as in Tevatron.

    {"id": "7", "contents": '"Rome"\\nA city.'} -> Passage("7", text="A city.", title="Rome")
    """
    title, text = record.get("title"), record.get("text")
    media = modalities() if record.keys() - _WORDS else ()
    files = {name: file for name in media if name in record and (file := text_of(record[name], name))}
    if text is None:
        contents = record.get("contents", "" if files else None)
        if contents is None:
            others = "".join(f' nor "{name}"' for name in ("text", *modalities()))
            there = ", ".join(key for key, value in record.items() if value not in (None, ""))
            raise ValueError(f'neither "contents"{others}; there are {there or "no columns"}'[:300])
        title, text = _split(text_of(contents, "contents"), title)
    passage = Passage(
        id=needed_id(first_of(record, "id", "_id", "docid")),
        text=text_of(text, "text").strip(),
        title=text_of(title, "title").strip(),
        metadata=object_of(record["metadata"], "metadata") if "metadata" in record else {},
        image=files.pop("image", ""),
        media=files,
    )
    return passage.keep_verbatim(record["contents"]) if "contents" in record else passage


def passage_row(passage: Passage, folder: str | Path) -> dict[str, Any]:
    """The line of a passage in a corpus that lies in `folder`, with all its fields."""
    row: dict[str, Any] = {"id": passage.id, "title": passage.title, "text": passage.text}
    if passage.verbatim:
        row["contents"] = passage.verbatim
    if passage.metadata:
        row["metadata"] = dict(passage.metadata)
    return row | {name: relative_to(file, folder) for name, file in passage.files.items()}


def relative_to(file: str, folder: str | Path) -> str:
    """The path of a file as a corpus in `folder` writes it; "" stays "".   /a/b/x.png, /a -> b/x.png"""
    return Path(os.path.relpath(file, folder)).as_posix() if file else ""


def _split(contents: str, title: Any) -> tuple[Any, str]:
    """Title and text; a title that the record gives besides wins over the first line."""
    first, rest = split_contents(contents)
    if title is None:
        return first, rest
    return title, rest if first and first == title else contents


def first_of(record: Mapping[str, Any], *names: str) -> Any:
    """The first value among these names that is not null."""
    return next((record[name] for name in names if record.get(name) is not None), None)


def shown(value: Any) -> str:
    """The start of a value, for messages, as JSON writes it."""
    return json.dumps(value, ensure_ascii=False, default=str)[:40]


def _plain(value: Any, name: str) -> Any:
    try:
        return plain(value)
    except ValueError as error:
        raise ValueError(f'"{name}" holds {error}') from error


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _answer(value: Any) -> str:
    value = _whole(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"a gold answer must be a string, found {shown(value)}")
    return str(value).strip()


def _held_list(value: Any) -> list[Any] | None:
    """The scalars in a string that holds a list, as JSON or Python writes it; None for another value."""
    if not isinstance(value, str) or not (value.strip().startswith("[") and value.strip().endswith("]")):
        return None
    held = _parsed(value)
    if held is None and _PYTHON_LIST.fullmatch(value.strip()):
        held = ast.literal_eval(value.strip())
    scalars = isinstance(held, list) and not any(isinstance(each, list | dict) for each in held)
    return held if scalars else None


def _held_object(value: Any) -> Any:
    held = None
    if isinstance(value, str) and value.strip().startswith("{") and (held := _parsed(value)) is None:
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            held = ast.literal_eval(value.strip()) if len(value) <= _MAX_LITERAL_CHARS else None
    return held if isinstance(held, dict) else value


def _parsed(text: str) -> Any:
    try:
        return replace_halves_in(json.loads(text), text.encode())
    except (ValueError, RecursionError):
        return None
