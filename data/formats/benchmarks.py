"""Test collections as their makers hand them out, named as FOLDER:PART.

The part is a split of BEIR's or ViDoRe's (test without one), a domain of BRIGHT's, such as `biology`, or
`biology-long` for whole documents.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.formats import beir, bright, vidore
from data.formats.rows import passage_row
from data.records import Benchmark, Hit

logger = logging.getLogger(__name__)


def load_benchmark(name: str) -> Benchmark:
    """The queries, qrels and exclusions of FOLDER[:PART]; ConfigError where there is no such collection."""
    folder, part = _place(name)
    return _form_of(folder).load(folder, part)


def is_benchmark(name: str | Path) -> bool:
    """Return whether FOLDER[:PART] holds a collection of BEIR's, BRIGHT's or ViDoRe's form."""
    folder, _ = _place(str(name))
    return _form_of(folder).has_layout(folder)


def benchmark_passages(name: str, beside: str | Path = "") -> Iterator[dict[str, Any]]:
    """The corpus of FOLDER[:PART], as the rows of ours.

    beside: the folder of the corpus that is written; paths of images start there, and pictures out of
    parquet files go into its subfolder `images`. A passage of a title alone has it as its text; those
    without any text or image are left out and counted.
    """
    folder, part = _place(name)
    beside, empty = Path(beside), 0
    for _, passage in _form_of(folder).passages(folder, part, beside / "images"):
        if passage.text or passage.files:
            yield passage_row(passage, beside)
        else:
            empty += 1
    if empty:
        logger.warning("%s: %d passages without any text are left out", name, empty)


def without_excluded(
    rankings: Mapping[str, Sequence[Hit]], excluded: Mapping[str, frozenset[str]], top_k: int
) -> dict[str, list[Hit]]:
    """The best `top_k` hits of each query that are not excluded for it."""
    none: frozenset[str] = frozenset()
    return {
        id_: [hit for hit in hits if hit.passage.id not in excluded.get(id_, none)][:top_k]
        for id_, hits in rankings.items()
    }


def _form_of(folder: Path) -> Any:
    """The module that reads the layout of a folder; BEIR's where it is of none."""
    return next((form for form in (bright, vidore) if form.has_layout(folder)), beir)


def _place(name: str) -> tuple[Path, str | None]:
    folder, colon, part = name.rpartition(":")
    if colon and not Path(name).is_dir() and Path(folder).is_dir():
        return Path(folder), part
    return Path(name), None
