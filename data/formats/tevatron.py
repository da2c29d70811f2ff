"""Tevatron's training data.

first form   lines {query_id, query, positive_passages: [{docid, title, text}], negative_passages}
second form  a folder: corpus.jsonl {docid, title, text, image}, train.jsonl {query_id, query_text,
             query_image, positive_document_ids, negative_document_ids}; or .parquet, with images as bytes
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.examples import Examples
from data.formats.rows import first_of, id_of, ids_of, needed_id, relative_to, text_of
from data.formats.tables import at, image_file, read_part, read_rows
from data.formats.training import Items, items_of, passage_of, passages_by_id, passages_in, query_ids
from data.jsonl import write_jsonl
from data.records import Example, Passage

_LISTS = ("positive_passages", "negative_passages")
_ID_LISTS = ("positive_document_ids", "negative_document_ids")
_PICTURES_AT_ONCE = 16


def read(path: Path, split: str, images: Path) -> Items:
    """The passages and examples of the first form."""
    for place, row in read_rows(path):
        with at(place):
            good, bad = (passages_in(row.get(name), name, "docid") for name in _LISTS)
            yield from items_of(place, row["query"], good, bad, query_id=id_of(row.get("query_id")))


def write(examples: Examples, out: Path) -> None:
    """Write the first form."""

    def texts(ids: Iterable[str]) -> list[dict[str, Any]]:
        return [_row(passage) for passage in passages_by_id(examples.corpus, ids)]

    rows = (
        {
            "query_id": id_,
            "query": example.query,
            "positive_passages": texts(example.positives),
            "negative_passages": texts(example.negatives),
        }
        for id_, example in zip(query_ids(examples), examples, strict=True)
    )
    write_jsonl(out, rows)


def read_folder(path: Path, split: str, images: Path) -> Items:
    """The passages and examples of the second form."""
    for place, row in read_part(path, "corpus", _PICTURES_AT_ONCE):
        with at(place):
            id_, text = needed_id(row.get("docid"), "docid"), first_of(row, "text", "document_text")
            picture = first_of(row, "image", "document_image")
            passage = passage_of(id_, row.get("title"), text)
            yield place, replace(passage, image=image_file(picture, path, images))
    for place, row in read_part(path, "train", _PICTURES_AT_ONCE):
        with at(place):
            good, bad = (ids_of(row.get(name), name) for name in _ID_LISTS)
            image = image_file(row.get("query_image"), path, images)
            query, id_ = (
                text_of(row.get("query_text"), "query_text"),
                needed_id(row.get("query_id"), "query_id"),
            )
            yield place, Example(query, good, bad, query_id=id_, query_image=image)


def write_folder(examples: Examples, out: Path) -> None:
    """Write the second form."""
    corpus = (_row(p) | {"image": relative_to(p.image, out) or None} for p in examples.corpus)
    write_jsonl(out / "corpus.jsonl", corpus)
    rows = (
        {
            "query_id": id_,
            "query_text": example.query,
            "query_image": relative_to(example.query_image, out) or None,
            "positive_document_ids": list(example.positives),
            "negative_document_ids": list(example.negatives),
        }
        for id_, example in zip(query_ids(examples), examples, strict=True)
    )
    write_jsonl(out / "train.jsonl", rows)


def _row(passage: Passage) -> dict[str, Any]:
    return {"docid": passage.id, "title": passage.title, "text": passage.text}
