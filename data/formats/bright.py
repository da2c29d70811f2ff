"""BRIGHT's folders, by domain, such as biology, or biology-long for whole documents.

documents/DOMAIN-*.parquet        {id, content}; long_documents/ where there are any
examples/DOMAIN-*.parquet         {id, query, gold_ids, gold_ids_long, excluded_ids}
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.errors import ConfigError, DataError
from data.formats.rows import ids_of, needed_id, text_of
from data.formats.tables import Rows, at, parts, read_rows
from data.formats.training import passage_of
from data.records import Benchmark, Passage, Question

_LONG = "-long"
_TASKS = {
    "pony": ("{} question", "passages", "question"),
    "leetcode": ("coding problem", "examples", "problem"),
    "aops": ("Math problem", "examples", "problem"),
    "theoremqa_questions": ("Math problem", "examples", "problem"),
    "theoremqa_theorems": ("Math problem", "theorems", "problem"),
}
_POST = ("{} post", "passages", "post")


def has_layout(folder: Path) -> bool:
    """Return whether a folder holds examples/ and documents/, as BRIGHT's does."""
    return (folder / "examples").is_dir() and (folder / "documents").is_dir()


def load(folder: Path, part: str | None) -> Benchmark:
    """The queries of a domain, their qrels, what `excluded_ids` lists, and the instruction."""
    domain, long = _domain(folder, part)
    gold = "gold_ids_long" if long else "gold_ids"
    queries, qrels, excluded = [], {}, {}
    for place, row in _rows(folder / "examples", domain):
        with at(place):
            id_ = needed_id(row["id"])
            if id_ in qrels:
                raise ValueError(f"query {id_!r} stands there twice")
            queries.append(Question(id_, text_of(row["query"], "query"), ()))
            qrels[id_] = dict.fromkeys(ids_of(row[gold], gold), 1)
            none = frozenset(ids_of(row.get("excluded_ids"), "excluded_ids")) - {
                "N/A"
            }  # their way to say none
            if both := none & qrels[id_].keys():
                raise DataError(f"{folder}: query {id_!r}: {min(both)!r} is both relevant and excluded")
            excluded |= {id_: none} if none else {}
    what, wanted, answered = _TASKS.get(domain, _POST)
    wanted, what = "documents" if long else wanted, what.format(domain)
    instruction = f"Given a {what}, retrieve relevant {wanted} that help answer the {answered}"
    return Benchmark(queries, qrels, excluded, instruction)


def passages(folder: Path, part: str | None, images: Path) -> Iterator[tuple[str, Passage]]:
    """The passages of a domain."""
    domain, long = _domain(folder, part)
    for place, row in _rows(folder / ("long_documents" if long else "documents"), domain):
        with at(place):
            yield place, passage_of(needed_id(row["id"]), "", row["content"])


def _domain(folder: Path, part: str | None) -> tuple[str, bool]:
    domain = (part or "").removesuffix(_LONG)
    files = (folder / "examples").glob("*.parquet")
    there = sorted({path.name.rpartition("-of-")[0].rpartition("-")[0] for path in files})
    if domain not in there:
        raise ConfigError(f"benchmark {folder}:{part or ''}: must name a domain, one of {', '.join(there)}")
    return domain, (part or "").endswith(_LONG)


def _rows(folder: Path, domain: str) -> Rows:
    return (row for path in parts(folder, domain) for row in read_rows(path))
