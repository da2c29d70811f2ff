"""ViDoRe's layout of a test collection: parquet files, with the pictures of the pages in them.

    corpus/SPLIT-*.parquet    {corpus-id, image}          image: {bytes, path}
    queries/SPLIT-*.parquet   {query-id, query}
    qrels/SPLIT-*.parquet     {query-id, corpus-id, score}

or, in its first form, data/SPLIT-*.parquet {query, image, image_filename}: a question with its page, or a
page without one. Newer sets write `corpus_id` and `query_id`, and may say what is written on a page. Sets of
text have the same layout on the hub (BEIR, MTEB): {_id, title, text} in corpus/corpus-*.parquet and
queries/queries-*.parquet, which serve every split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.errors import ConfigError
from data.formats.rows import first_of, id_of, needed_id, text_of
from data.formats.tables import Rows, at, image_file, parquet_columns, parts, read_rows
from data.formats.training import Items, judged_items, passage_of
from data.formats.trec import add_judgement
from data.records import Benchmark, Passage, Qrels, Question

_PAGES_AT_ONCE = 16  # rows with pictures in memory
_TEXTS = ("text", "markdown")


def has_layout(folder: Path) -> bool:
    """Return whether a folder has one of ViDoRe's layouts: three tables, or pages with their queries."""
    first = next((folder / "data").glob("*.parquet"), None)
    return _is_three(folder) or (first is not None and {"query", "image"} <= set(parquet_columns(first)))


def load(folder: Path, split: str | None) -> Benchmark:
    """The queries that are judged and their qrels. Raises ConfigError for a split that is not there."""
    split = _checked(folder, split)
    queries: dict[str, Question] = {}
    qrels = Qrels()
    if not _is_three(folder):
        for number, (place, row) in enumerate(_rows(folder / "data", split)):
            with at(place):
                if text := text_of(row.get("query"), "query"):
                    queries[str(number)] = Question(str(number), text, ())
                    add_judgement(qrels, str(number), _page_id(row, number), 1)
        return Benchmark(list(queries.values()), qrels)
    for place, row in _rows(folder / "qrels", split):
        with at(place):
            add_judgement(qrels, _id(row, "query"), _id(row, "corpus"), row["score"])
    for place, row in _rows(folder / "queries", split):
        with at(place):
            if (id_ := _id(row, "query")) in queries:
                raise ValueError(f"query {id_!r} stands there twice")
            queries[id_] = Question(id_, text_of(first_of(row, "query", "text"), "query"), ())
    return Benchmark([query for query in queries.values() if query.id in qrels], qrels)


def passages(folder: Path, split: str | None, images: Path) -> Iterator[tuple[str, Passage]]:
    """The pages; their pictures are written to files in `images`, and each id comes once."""
    split = _checked(folder, split)
    three, seen = _is_three(folder), set()
    for number, (place, row) in enumerate(_rows(folder / ("corpus" if three else "data"), split)):
        with at(place):
            id_ = _id(row, "corpus") if three else _page_id(row, number)
            if id_ in seen:
                continue
            seen.add(id_)
            page = passage_of(id_, row.get("title"), first_of(row, *_TEXTS))
            with at(f"{folder}: page {id_!r}"):
                yield place, replace(page, image=image_file(row.get("image"), folder, images))


def read(path: Path, split: str, images: Path) -> Items:
    """The pages, and an example of each query that the split judges."""
    benchmark = load(path, split)
    yield from passages(path, split, images)
    yield from judged_items(str(path), benchmark.queries, benchmark.qrels)


def _is_three(folder: Path) -> bool:
    return all(any((folder / name).glob("*.parquet")) for name in ("corpus", "queries", "qrels"))


def _checked(folder: Path, split: str | None) -> str:
    """Return the split, test if none is given."""
    split = split or "test"
    files = (folder / ("qrels" if _is_three(folder) else "data")).glob("*.parquet")
    there = sorted({path.stem.partition("-")[0] for path in files})
    if not there:
        raise ConfigError(f"benchmark {folder}: must be a folder of ViDoRe's parquet files")
    if split not in there:
        raise ConfigError(f"benchmark {folder}:{split}: must name a split, one of {', '.join(there)}")
    return split


def _rows(folder: Path, split: str) -> Rows:
    named = split if any(folder.glob(f"{split}[-.]*")) else folder.name  # one file for every split
    return (row for path in parts(folder, named) for row in read_rows(path, _PAGES_AT_ONCE))


def _id(row: Mapping[str, Any], what: str) -> str:
    return needed_id(first_of(row, f"{what}-id", f"{what}_id", "_id"), f"{what}-id")


def _page_id(row: Mapping[str, Any], number: int) -> str:
    """A page's file name; in the first form a page stands on the line of each of its questions."""
    return id_of(row.get("image_filename"), "image_filename") or str(number)
