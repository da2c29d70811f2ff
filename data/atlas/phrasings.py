"""The sentences of phrasings.yaml, by which passages and questions are put into words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

_TABLES: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))

CLAUSES: Mapping[str, Mapping[str, Sequence[str]]] = _TABLES["clauses"]
ASKED: Mapping[str, Sequence[str]] = _TABLES["asked"]
COMPARED: Mapping[str, Sequence[str]] = _TABLES["compared"]
LOCATORS: Mapping[str, Sequence[str]] = _TABLES["locators"]
INDIRECT: Mapping[str, Sequence[str]] = _TABLES["indirect"]
SUMMIT_OF: str = _TABLES["summit_of"]


def phrasing(options: Sequence[str], number: int, seen: bool) -> str:
    """Return one of the phrasings: by number among those of every split, or the one for tests alone."""
    return options[number % (len(options) - 1)] if seen else options[-1]
