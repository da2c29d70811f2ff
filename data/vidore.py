"""ViDoRe's layout of a test collection: parquet files, with the pictures of the pages in them.

    corpus/SPLIT-*.parquet    {corpus-id, image}          image: {bytes, path}
    queries/SPLIT-*.parquet   {query-id, query}
    qrels/SPLIT-*.parquet     {query-id, corpus-id, score}

or, in its first form, data/SPLIT-*.parquet {query, image, image_filename}: a question with its page, or a
page without one. Newer sets write `corpus_id` and `query_id`, and may say what is written on a page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data.errors import ConfigError, DataError
from data.parquet import image_file, parquet_columns, parts, read_parquet
from data.qrels import Qrels
from data.records import Passage, Question

_PAGES_AT_ONCE = 16  # rows with pictures in memory
_TEXTS = ("text", "markdown")


def is_vidore(folder: Path) -> bool:
    """Whether a folder has one of these layouts."""
    first = next((folder / "data").glob("*.parquet"), None)
    return _is_three(folder) or (first is not None and {"query", "image"} <= set(parquet_columns(first)))


def load_vidore(folder: Path, split: str = "test") -> tuple[list[Question], Qrels]:
    """The queries that are judged and their qrels. Raises ConfigError for a split that is not there."""
    _check_split(folder, split)
    if not _is_three(folder):
        rows = [(n, row) for n, row in enumerate(_rows(folder / "data", split)) if row.get("query")]
        asked = [Question(str(n), row["query"], ()) for n, row in rows]
        return asked, {str(n): {_page_id(row, n): 1} for n, row in rows}
    qrels: Qrels = {}
    for row in _rows(folder / "qrels", split):
        qrels.setdefault(_id(row, "query"), {})[_id(row, "corpus")] = int(row["score"])
    queries = [Question(_id(row, "query"), row["query"], ()) for row in _rows(folder / "queries", split)]
    return [query for query in queries if query.id in qrels], qrels


def vidore_passages(folder: Path, images: Path, split: str = "test") -> Iterator[Passage]:
    """The pages; their pictures are written to files in `images`, and each id comes once."""
    _check_split(folder, split)
    three, seen = _is_three(folder), set()
    for number, row in enumerate(_rows(folder / ("corpus" if three else "data"), split)):
        id_ = _id(row, "corpus") if three else _page_id(row, number)
        if id_ in seen:
            continue
        seen.add(id_)
        text = next((row[name] for name in _TEXTS if isinstance(row.get(name), str)), "")
        try:
            image = image_file(row.get("image"), folder, images)
        except ValueError as error:
            raise DataError(f"{folder}: page {id_!r}: {error}") from error
        yield Passage(id_, text, image=image)


def _is_three(folder: Path) -> bool:
    return all(_has(folder, name) for name in ("corpus", "queries", "qrels"))


def _has(folder: Path, name: str) -> bool:
    return any((folder / name).glob("*.parquet"))


def _check_split(folder: Path, split: str) -> None:
    files = (folder / ("queries" if _is_three(folder) else "data")).glob("*.parquet")
    there = sorted({path.stem.partition("-")[0] for path in files})
    if split not in there:
        raise ConfigError(f"benchmark {folder}:{split}: must name a split, one of {', '.join(there)}")


def _rows(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    return (row for path in parts(folder, split) for row in read_parquet(path, _PAGES_AT_ONCE))


def _id(row: Mapping[str, Any], what: str) -> str:
    value = row.get(f"{what}-id", row.get(f"{what}_id"))
    if value is None:
        raise DataError(f'no "{what}-id" in a row of {", ".join(row)}')
    return str(value)


def _page_id(row: Mapping[str, Any], number: int) -> str:
    """A page's file name; in the first form a page stands on the line of each of its questions."""
    return str(row.get("image_filename") or number)
