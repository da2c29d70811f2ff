"""Metadata filters: which passages of a corpus a search may return.

    {"year": 1999}                         equal
    {"year": {"in": [1999, 2001]}}         one of
    {"year": {"gte": 1990, "lt": 2000}}    gte, gt, lte, lt: within, for numbers or for strings

Several fields must all agree. A passage without the field, or with a value of another type, is not
allowed (1 is not "1", nor true); where its value is a list, one element that agrees is enough.
"""

from __future__ import annotations

import json
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from data.corpus import Corpus
from data.errors import DataError
from retriever_server.retriever import Filter

_BOUNDS: dict[str, Callable[[Any, Any], bool]] = {
    "gte": operator.ge,
    "gt": operator.gt,
    "lte": operator.le,
    "lt": operator.lt,
}
_MASKS: OrderedDict[tuple[str, str], np.ndarray] = OrderedDict()
_MASKS_KEPT = 64
_LOCK = threading.Lock()

Test = Callable[[Any], bool]


def allowed(corpus: Corpus, where: Filter) -> np.ndarray:
    """Which passages `where` allows, (P,) booleans, not to be written to; DataError for a wrong filter.

    The first use of a filter reads the whole corpus (about 10 s a million passages); the last 64 are kept.
    """
    tests = parse_filter(where)
    key = corpus.content_hash, json.dumps(where, sort_keys=True)
    with _LOCK:
        if (mask := _MASKS.get(key)) is not None:
            _MASKS.move_to_end(key)
            return mask
    matching = (_matches(passage.metadata, tests) for passage in corpus)
    mask = np.fromiter(matching, dtype=bool, count=len(corpus))
    mask.setflags(write=False)
    with _LOCK:
        _MASKS[key] = mask
        while len(_MASKS) > _MASKS_KEPT:
            _MASKS.popitem(last=False)
    return mask


def parse_filter(where: Any) -> dict[str, Test]:
    """What each field of a filter asks of a value; DataError says what is wrong with it."""
    if not isinstance(where, Mapping) or not all(isinstance(name, str) for name in where):
        raise DataError(f"filter {_short(where)}: must be an object of field names and what they must be")
    return {name: _parse_condition(name, condition) for name, condition in where.items()}


def _parse_condition(name: str, condition: Any) -> Test:
    if not isinstance(condition, Mapping):
        return _one_of(name, [condition])
    if set(condition) == {"in"} and isinstance(condition["in"], list | tuple):
        return _one_of(name, condition["in"])
    if condition and set(condition) <= set(_BOUNDS):
        return _within(name, condition)
    raise DataError(
        f"filter on {name!r}: {_short(condition)}: must be a value, "
        '{"in": [values]}, or bounds of gte, gt, lte, lt'
    )


def _one_of(name: str, values: list | tuple) -> Test:
    for value in values:
        if not isinstance(value, str | int | float | None):
            raise DataError(f"filter on {name!r}: {_short(value)}: must be a string, number, boolean or null")
    keys = {(_type(value), value) for value in values}
    return lambda found: (_type(found), found) in keys


def _within(name: str, bounds: Mapping[str, Any]) -> Test:
    types = {_type(bound) for bound in bounds.values()}
    if types not in ({"number"}, {"string"}):
        raise DataError(f"filter on {name!r}: {_short(bounds)}: bounds must be all numbers or all strings")
    [kind] = types
    return lambda found: (
        _type(found) == kind and all(_BOUNDS[which](found, bound) for which, bound in bounds.items())
    )


def _matches(metadata: Mapping[str, Any], tests: Mapping[str, Test]) -> bool:
    return all(name in metadata and _agrees(metadata[name], test) for name, test in tests.items())


def _agrees(found: Any, test: Test) -> bool:
    values = found if isinstance(found, list) else [found]
    return any(test(value) for value in values if not isinstance(value, list | dict))


def _type(value: Any) -> str:
    """JSON's name of a scalar's type: to Python True is 1, to JSON it is not."""
    if isinstance(value, bool) or value is None:
        return repr(value)
    return "string" if isinstance(value, str) else "number" if isinstance(value, int | float) else "other"


def _short(value: Any) -> str:
    return json.dumps(value, default=repr)[:80]
