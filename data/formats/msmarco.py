"""MS MARCO's tables of training data, with tabs between and no quotes.

a folder    collection.tsv (id, text), queries.tsv (id, text), triples.tsv (ids of query, positive, negative)
a file      triples of texts

A first line of words such as "pid passage" is a header, and passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from data.atomic import open_atomic
from data.errors import DataError
from data.examples import Examples
from data.formats.beir import load_queries
from data.formats.rows import needed_id
from data.formats.tables import at, read_lines, table_line
from data.formats.training import Items, one_text, passage_of, query_ids
from data.records import Example

# The words of headers; none is likely to be an id, so that the first row of a writer's file stays.
_ID, _TEXT = r"(\w+[ _-]?)?id", r"text|passage|document|contents"
_HEADERS = [(_ID, _TEXT), (_ID, _ID, _ID), ("query|question|anchor", r"pos\w*", r"neg\w*")]


def read(path: Path, split: str, images: Path) -> Items:
    """The passages, and an example of each query; triples of texts name the passages by these."""
    grouped: dict[str, list[tuple[str, str]]] = {}
    texts: Mapping[str, str] = {}
    if path.is_file():
        for place, (query, good, bad) in _fields(path, 3):
            sides = [passage_of(None, "", text) for text in (good, bad)]
            yield from ((place, passage) for passage in sides)
            grouped.setdefault(query, []).append((sides[0].id, sides[1].id))
    else:
        for place, (id_, text) in _fields(path / "collection.tsv", 2):
            with at(place):
                yield place, passage_of(needed_id(id_), "", text)
        texts = {query.id: query.text for query in load_queries(path / "queries.tsv")}
        for place, (query, good, bad) in _fields(path / "triples.tsv", 3):
            if query not in texts:
                raise DataError(f"{place}: query {query!r} is not in {path / 'queries.tsv'}")
            grouped.setdefault(query, []).append((good, bad))
    for query, pairs in grouped.items():
        good, bad = (tuple(dict.fromkeys(side)) for side in zip(*pairs, strict=True))
        id_ = query if texts else ""
        yield f"{path}: query {query[:40]}", Example(texts.get(query, query), good, bad, query_id=id_)


def write(examples: Examples, out: Path) -> None:
    """Write triples of ids; an example without negatives cannot be told, and is refused.

    In texts every run of white space becomes a space.
    """
    with open_atomic(out / "collection.tsv") as file:
        for passage in examples.corpus:
            with at(str(examples.corpus.path)):
                file.write(table_line(passage.id, _flat(one_text(passage))))
    with open_atomic(out / "queries.tsv") as queries, open_atomic(out / "triples.tsv") as triples:
        for i, (id_, example) in enumerate(zip(query_ids(examples), examples, strict=True)):
            with at(examples.place(i)):
                if not example.negatives:
                    raise ValueError("has no negatives: a triple needs one")
                queries.write(table_line(id_, _flat(example.query)))
                for good in example.positives:
                    triples.writelines(table_line(id_, good, bad) for bad in example.negatives)


def _fields(path: Path, count: int) -> Iterator[tuple[str, list[str]]]:
    for number, (place, line) in enumerate(read_lines(path)):
        fields = line.split("\t")
        if len(fields) != count:
            raise DataError(f"{place}: {len(fields)} fields with tabs between, expected {count}")
        if number or not any(map(partial(_are, fields), _HEADERS)):
            yield place, fields


def _are(fields: list[str], words: tuple[str, ...]) -> bool:
    return len(fields) == len(words) and all(
        re.fullmatch(word, field.strip(), re.IGNORECASE) for word, field in zip(words, fields, strict=True)
    )


def _flat(text: str) -> str:
    return " ".join(text.split())
