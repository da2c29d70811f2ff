"""Pairs and triplets in columns, as sentence-transformers has them.

A file is .jsonl, .parquet, or .csv or .tsv with a header. Columns go by their names, in any order: a query, a
positive, negatives, a label or score. Columns of ids, and of pandas's index, are passed
over; another name is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from data.examples import Examples
from data.formats.rows import list_of, number_of, plain, scores_of
from data.formats.tables import at, read_rows
from data.formats.training import Items, items_of, one_text, passages_by_id, passages_in
from data.jsonl import write_jsonl
from data.records import Passage

_ROLES = {
    "query": "anchor|query|question|q|sentence1",
    "positive": r"pos(itive)?s?(_?\d+)?",
    "passage": "passage|document|doc|context|answer|response|text|p|sentence2",
    "negative": r"(hard_)?neg(ative)?s?(_?\d+)?",
    "label": "labels?|scores?",
    "id": r"(\w+_)?_?(id|idx|index|guid)|[qp]id|docid|(unnamed:_0)?|__index_level_0__",
}
_ALLOWED = (
    "one of anchor, query, question; one positive, passage, document or answer; negative or negative_1, "
    "negative_2 ...; label or score; ids"
)


def read(path: Path, split: str, images: Path) -> Items:
    """The passages, named by their texts, and an example a row."""
    for place, row in read_rows(path):
        with at(place):
            roles = _roles(tuple(row))
            query, label = (row[roles[role][0]] if roles[role] else None for role in ("query", "label"))
            good, bad = (
                [p for column in roles[role] for p in passages_in(row[column], column, "id")]
                for role in ("positive", "negative")
            )
            yield from items_of(place, query, good, bad, scores=_scores(label, (*good, *bad)))


def write(examples: Examples, out: Path) -> None:
    """Write a row a positive; as many negatives as every example has; labels where all have their scores."""
    count = min(len(example.negatives) for example in examples)
    names = ("positive", *(f"negative_{i}" for i in range(1, count + 1)))
    used = [(example, (*example.positives, *example.negatives[:count])) for example in examples]
    labels = all(id_ in (example.scores or {}) for example, ids in used for id_ in ids)

    def rows() -> Iterator[dict[str, Any]]:
        for example, _ in used:
            for positive in example.positives:
                ids = (positive, *example.negatives[:count])
                texts = [one_text(passage) for passage in passages_by_id(examples.corpus, ids)]
                label = {"label": [(example.scores or {})[id_] for id_ in ids]} if labels else {}
                yield {"anchor": example.query, **dict(zip(names, texts, strict=True)), **label}

    write_jsonl(out, rows())


def _scores(label: Any, passages: Sequence[Passage]) -> dict[str, float]:
    """The scores in a list of labels; none in a single one, which must be positive."""
    values = list_of(label, "label")
    if values != [plain(label)]:
        return scores_of(values, [passage.id for passage in passages], "label")
    if not number_of(label, "label") > 0:
        raise ValueError(f"label {label}: must be > 0; a pair that does not belong together is no example")
    return {}


@lru_cache(64)
def _roles(columns: tuple[str, ...]) -> dict[str, list[str]]:
    """The columns that hold the query, positives, negatives and the label; ValueError where it is unclear."""
    roles: dict[str, list[str]] = {role: [] for role in _ROLES}
    unknown = []
    for column in columns:
        name = re.sub(r"[- ]", "_", column.strip().lower())
        role = next((role for role, names in _ROLES.items() if re.fullmatch(names, name)), None)
        (unknown if role is None else roles[role]).append(column)
    given = f"columns {', '.join(columns)}: must be {_ALLOWED}"
    if unknown:
        raise ValueError(f"{given}; unclear: {', '.join(unknown)}")
    if len(roles["query"]) != 1 or len(roles["label"]) > 1:
        raise ValueError(given)
    if bool(roles["positive"]) + len(roles["passage"]) != 1:
        raise ValueError(given)
    return roles | {"positive": roles["positive"] or roles["passage"]}
