"""Metadata filters: which passages of a corpus a search may return, and documents by their url.

    {"year": 1999}                         equal
    {"year": {"in": [1999, 2001]}}         one of
    {"year": {"gte": 1990, "lt": 2000}}    gte, gt, lte, lt: within, for numbers or for strings

Several fields must all agree. A passage without the field, or with a value of another type, is not
allowed (1 is not "1", nor true); where its value is a list, one element that agrees is enough.
"""

from __future__ import annotations

import asyncio
import json
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from data.columns import encode, is_float, json_type, load_columns, wait_for_columns
from data.errors import DataError
from data.records import Passage
from retriever_server.retriever import Filter

if TYPE_CHECKING:
    from data.corpus import Corpus

Agrees = Callable[[str, Any], Any]
"""See `Columns.positions`."""

_BOUNDS: dict[str, Callable[[Any, Any], Any]] = {
    "gte": operator.ge,
    "gt": operator.gt,
    "lte": operator.le,
    "lt": operator.lt,
}
_MASKS: OrderedDict[tuple[str, str], np.ndarray] = OrderedDict()
_MASKS_KEPT = 64
_LOCK = threading.Lock()


def allowed(corpus: Corpus, where: Filter) -> np.ndarray:
    """Return the passages that `where` allows, (P,) booleans, not to be written to; DataError if it is wrong.

    The last 64 are kept. The first filter over the corpus of an index that keeps no metadata reads it once.
    """
    conditions = parse_filter(where)
    key = corpus.content_hash, json.dumps(where, sort_keys=True)
    with _LOCK:
        if (mask := _MASKS.get(key)) is not None:
            _MASKS.move_to_end(key)
            return mask
    columns, mask = load_columns(corpus).result(), np.ones(len(corpus), bool)
    for name, agrees in conditions.items():
        kept = np.zeros(len(corpus), bool)
        kept[columns.positions(name, agrees)] = True
        mask &= kept
    mask.setflags(write=False)
    with _LOCK:
        _MASKS[key] = mask
        while len(_MASKS) > _MASKS_KEPT:
            _MASKS.popitem(last=False)
    return mask


def is_url(place: str) -> bool:
    """Return whether it may name passages by the url in their metadata."""
    return "://" in place


def find_documents(corpus: Corpus, places: Sequence[str], whole: bool = False) -> list[Passage | None]:
    """Return the document at each place: a passage by its id, or all passages of a url in one.

    None where there is none: nothing outside the corpus is ever looked for. whole: places are ids, of each
    the document that the passage is from.
    """
    if whole:
        return [corpus.document(place) for place in places]
    documents = {place: corpus.get(place) for place in places}
    urls = [place for place, found in documents.items() if found is None and is_url(place)]
    parts: dict[str, list[Passage]] = {url: [] for url in urls}
    positions = load_columns(corpus).result().positions("url", one_of(urls)) if urls else ()
    for position in sorted(set(map(int, positions))):
        passage = corpus[position]
        if isinstance(url := passage.metadata["url"], str):
            parts[url].append(passage)
    for url, found in parts.items():
        if found:
            text = "\n".join(part.text for part in found)
            documents[url] = Passage(found[0].id, text, found[0].title, found[0].metadata)
    return [documents[place] for place in places]


async def prepare(corpus: Corpus, where: Filter) -> None:
    """Note what `where` allows, in a thread that no search needs."""
    await wait_for_columns(corpus)
    await asyncio.to_thread(allowed, corpus, where)


def parse_filter(where: Any) -> dict[str, Agrees]:
    """Return the condition on each field of a filter; DataError says what is wrong with it."""
    if not isinstance(where, Mapping) or not all(isinstance(name, str) for name in where):
        raise DataError(f"filter {_short(where)}: must be an object of field names and what they must be")
    return {name: _parse_condition(name, condition) for name, condition in where.items()}


def _parse_condition(name: str, condition: Any) -> Agrees:
    if not isinstance(condition, Mapping):
        return one_of([condition], name)
    if set(condition) == {"in"} and isinstance(condition["in"], list | tuple):
        return one_of(condition["in"], name)
    if condition and set(condition) <= set(_BOUNDS):
        return _within(name, condition)
    raise DataError(
        f"filter on {name!r}: {_short(condition)}: must be a value, "
        '{"in": [values]}, or bounds of gte, gt, lte, lt'
    )


def one_of(values: Sequence[Any], name: str = "") -> Agrees:
    """Return whether each value found is one of these."""
    for value in values:
        if not isinstance(value, str | int | float | None):
            raise DataError(f"filter on {name!r}: {_short(value)}: must be a string, number, boolean or null")
    wanted: dict[str, list[Any]] = {}
    for value in values:
        wanted.setdefault(json_type(value), []).append(value)

    def agrees(kind: str, found: Any) -> Any:
        asked = wanted.get("number" if kind == "integer" else kind, [])
        if kind == "string":
            import pyarrow as pa
            import pyarrow.compute as pc

            options = pc.SetLookupOptions(pa.array(map(encode, asked), found.type))
            return pc.call_function("is_in", [found], options)
        if kind == "number":
            return np.isin(found, [float(value) for value in asked if is_float(value)])
        if kind == "integer":
            return [int(digits) in asked for digits in found.to_pylist()]
        return np.full(len(found), bool(asked))

    return agrees


def _within(name: str, bounds: Mapping[str, Any]) -> Agrees:
    types = {json_type(bound) for bound in bounds.values()}
    if types not in ({"number"}, {"string"}):
        raise DataError(f"filter on {name!r}: {_short(bounds)}: bounds must be all numbers or all strings")
    [asked] = types

    def agrees(kind: str, found: Any) -> Any:
        if asked != ("number" if kind == "integer" else kind):
            return np.zeros(len(found), bool)
        return np.all([_compare(which, kind, found, bound) for which, bound in bounds.items()], axis=0)

    return agrees


def _compare(which: str, kind: str, found: Any, bound: Any) -> Any:
    if kind == "string":
        import pyarrow as pa
        import pyarrow.compute as pc

        names = {"gte": "greater_equal", "gt": "greater", "lte": "less_equal", "lt": "less"}
        return np.asarray(pc.call_function(names[which], [found, pa.scalar(encode(bound), found.type)]))
    if kind == "number" and is_float(bound):
        return _BOUNDS[which](found, float(bound))
    values = found.tolist() if kind == "number" else map(int, found.to_pylist())  # no float is exact
    return [_BOUNDS[which](value, bound) for value in values]


def _short(value: Any) -> str:
    return json.dumps(value, default=repr)[:80]
