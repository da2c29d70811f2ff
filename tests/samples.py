"""Samples of one claim: a few in every run of the tests, the others where slow tests run."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick(few: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """The values of a parameter, or of several; all but the `few` are slow."""
    several = [value if isinstance(value, tuple) else (value,) for value in values]
    kept = [value if isinstance(value, tuple) else (value,) for value in few]
    return [pytest.param(*each, marks=() if each in kept else pytest.mark.slow) for each in several]
