"""Training data as other projects write it, read: the passages and the examples in a file or folder.

name                     what lies on disk
tevatron                 lines {query_id, query, positive_passages: [{docid, title, text}], negative_passages}
tevatron-v2              a folder: corpus.jsonl {docid, title, text, image}, train.jsonl {query_id,
                         query_text, query_image, positive_document_ids, negative_document_ids}; or .parquet
bge                      lines {query, pos: [text], neg: [text], pos_scores?, neg_scores?} (FlagEmbedding)
sentence-transformers    columns anchor, positive, negative_1 .. n, label? (.jsonl, .parquet, .csv, .tsv with
                         a header); so also plain pairs, whatever their columns are called
beir                     a folder: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv; with images, too
vidore                   a folder: corpus/, queries/ and qrels/SPLIT-*.parquet (read only)
dpr                      an array, or lines, of {question, answers, positive_ctxs, hard_negative_ctxs, ...}
msmarco                  a folder of collection.tsv, queries.tsv and triples.tsv (ids), or one file of triples
questions                our questions with metadata.supporting_ids, beside a corpus (read only)

A passage without an id is named after its text. An image is a path that starts at the folder, or bytes,
which go into files.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.corpus import parse_passage
from data.errors import DataError
from data.examples import Example
from data.jsonl import numbered_jsonl
from data.parquet import image_file, parts, read_parquet
from data.qrels import load_qrels, load_queries
from data.records import Passage
from data.vidore import load_vidore, vidore_passages

Items = Iterator[tuple[str, Passage | Example]]
"""Where it stands, and a passage or an example. The passages of an example come at any time."""

_LABELS = ("label", "labels", "score", "scores")
_PICTURES_AT_ONCE = 16
_SIDES = ("positive", "negative")


def text_id(title: str, text: str) -> str:
    """The id of a passage that came without one: the same text, the same id."""
    content = f"{title}\n{text.strip()}".encode("utf-8", "surrogatepass")
    return "t" + hashlib.blake2b(content, digest_size=8).hexdigest()


def _read_tevatron(path: Path, split: str, images: Path) -> Items:
    for place, row in _rows(path):
        with _at(place):
            sides = [[_docid_passage(each) for each in row.get(f"{side}_passages") or []] for side in _SIDES]
            yield from _with_texts(place, row["query"], *sides, query_id=str(row.get("query_id") or ""))


def _docid_passage(row: Mapping[str, Any]) -> Passage:
    title, text = row.get("title") or "", row.get("text") or row.get("document_text") or ""
    return Passage(str(row.get("docid") or text_id(title, text)), text, title)


def _read_tevatron_v2(path: Path, split: str, images: Path) -> Items:
    for place, row in _rows_or_parquet(path, "corpus"):
        with _at(place):
            picture = row.get("image") or row.get("document_image")
            passage = _docid_passage({"docid": row["docid"], **row})
            yield place, replace(passage, image=image_file(picture, path, images))
    for place, row in _rows_or_parquet(path, "train"):
        with _at(place):
            good, bad = (tuple(map(str, row[f"{side}_document_ids"] or [])) for side in _SIDES)
            image = image_file(row.get("query_image"), path, images)
            query, id_ = row.get("query_text") or "", str(row["query_id"])
            yield place, Example(query, good, bad, query_id=id_, query_image=image)


def _read_bge(path: Path, split: str, images: Path) -> Items:
    for place, row in _rows(path):
        with _at(place):
            sides = [[_named_by_text(text) for text in row.get(side) or []] for side in ("pos", "neg")]
            given = [row.get(f"{side}_scores") for side in ("pos", "neg")]
            scores = _scores(sides[0], given[0]) | _scores(sides[1], given[1])
            yield from _with_texts(place, row["query"], *sides, scores=scores)


def _read_columns(path: Path, split: str, images: Path) -> Items:
    """The first column is the query, the second the positive, the others but the label are negatives."""
    for place, row in _table(path):
        with _at(place):
            label = next((row[name] for name in _LABELS if name in row), None)
            texts = [value for name, value in row.items() if name not in _LABELS]
            if len(texts) < 2:
                raise ValueError(f"columns {', '.join(row)}: must be two or more, query and positive first")
            passages = [_named_by_text("" if text is None else text) for text in texts[1:]]
            if isinstance(label, str | int | float) and not float(label) > 0:
                raise ValueError(f"label {label}: a pair that does not belong together makes no example")
            scores = _scores(passages, label if isinstance(label, list) else None)
            yield from _with_texts(place, texts[0], passages[:1], passages[1:], scores=scores)


def _read_beir(path: Path, split: str, images: Path) -> Items:
    for place, row in _rows(path / "corpus.jsonl"):
        with _at(place):
            passage = parse_passage({**row, "id": row.get("_id") or row.get("id")})
            yield place, replace(passage, image=image_file(passage.image, path, images))
    tables = [path / "qrels" / f"{split}.tsv", path / "qrels.tsv"]
    qrels = load_qrels(next((table for table in tables if table.exists()), tables[0]))
    queries = path / "queries.jsonl"
    for query in load_queries(queries):
        if judged := qrels.get(query.id):
            good = tuple(id_ for id_, relevance in judged.items() if relevance > 0)
            bad = tuple(id_ for id_ in judged if id_ not in good)
            image = str(query.metadata.get("query_image") or "")
            example = Example(query.text, good, bad, None, query.id, query.gold_answers, query_image=image)
            yield f"{queries}: query {query.id}", example


def _read_vidore(path: Path, split: str, images: Path) -> Items:
    queries, qrels = load_vidore(path, split)
    yield from ((str(path), passage) for passage in vidore_passages(path, images, split))
    for query in queries:
        judged = qrels[query.id]
        good = tuple(id_ for id_, relevance in judged.items() if relevance > 0)
        bad = tuple(id_ for id_ in judged if id_ not in good)
        yield f"{path}: query {query.id}", Example(query.text, good, bad, query_id=query.id)


def _read_dpr(path: Path, split: str, images: Path) -> Items:
    for place, row in _array(path):
        with _at(place):
            names = ("positive_ctxs", "hard_negative_ctxs", "negative_ctxs")
            good, hard, easy = ([_context(each) for each in row.get(name) or []] for name in names)
            answers = tuple(map(str, row.get("answers") or ()))
            yield from _with_texts(place, row["question"], good, hard + easy, answers=answers)


def _context(row: Mapping[str, Any]) -> Passage:
    title, text = row.get("title") or "", row["text"]
    return Passage(str(row.get("passage_id") or row.get("psg_id") or text_id(title, text)), text, title)


def _read_msmarco(path: Path, split: str, images: Path) -> Items:
    if path.is_file():
        grouped: dict[str, list[tuple[str, str]]] = {}
        for place, (query, good, bad) in _tsv(path, 3):
            sides = [_named_by_text(good), _named_by_text(bad)]
            yield from ((place, passage) for passage in sides)
            grouped.setdefault(query, []).append((sides[0].id, sides[1].id))
        texts: Mapping[str, str] = {query: query for query in grouped}
    else:
        for place, (id_, text) in _tsv(path / "collection.tsv", 2):
            yield place, Passage(id_, text)
        texts = {id_: text for _, (id_, text) in _tsv(path / "queries.tsv", 2)}
        grouped = {}
        for place, (query, good, bad) in _tsv(path / "triples.tsv", 3):
            if query not in texts:
                raise DataError(f"{place}: query {query!r} is not in {path / 'queries.tsv'}")
            grouped.setdefault(query, []).append((good, bad))
    for query, pairs in grouped.items():
        good, bad = (tuple(dict.fromkeys(side)) for side in zip(*pairs, strict=True))
        id_ = "" if path.is_file() else query
        yield f"{path}: query {query[:40]}", Example(str(texts[query]), good, bad, query_id=id_)


def _read_questions(path: Path, split: str, images: Path) -> Items:
    for number, row in numbered_jsonl(path):
        place = f"{path}:{number}"
        with _at(place):
            ids = tuple(map(str, (row.get("metadata") or {}).get("supporting_ids") or []))
            answers = tuple(row.get("golden_answers") or [])
            yield place, Example(row["question"], ids, query_id=str(row.get("id") or ""), answers=answers)


def _with_texts(
    place: str, query: str, positives: list[Passage], negatives: list[Passage], **fields: Any
) -> Items:
    if not isinstance(query, str):
        raise ValueError(f"the query must be a string, found {json.dumps(query)[:40]}")
    yield from ((place, passage) for passage in (*positives, *negatives))
    good, bad = (tuple(p.id for p in side if p.text.strip()) for side in (positives, negatives))
    yield place, Example(query, good, bad, **fields)


def _scores(passages: list[Passage], values: list[float] | None) -> dict[str, float]:
    if not values:
        return {}
    if len(values) != len(passages):
        raise ValueError(f"{len(values)} scores for {len(passages)} passages")
    return {passage.id: float(value) for passage, value in zip(passages, values, strict=True)}


def _named_by_text(text: Any) -> Passage:
    if not isinstance(text, str):
        raise ValueError(f"a passage must be a string, found {json.dumps(text)[:40]}")
    return Passage(text_id("", text), text.strip())


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((f"{path}:{number}", row) for number, row in numbered_jsonl(path))


def _rows_or_parquet(folder: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of NAME.jsonl, or of NAME*.parquet where there is none."""
    if (folder / f"{name}.jsonl").exists() or not any(folder.glob(f"{name}*.parquet")):
        yield from _rows(folder / f"{name}.jsonl")
        return
    for path in parts(folder, name):
        for number, row in enumerate(read_parquet(path, _PICTURES_AT_ONCE)):
            yield f"{path}: row {number}", row


def _table(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".parquet":
        return ((f"{path}: row {number}", row) for number, row in enumerate(read_parquet(path)))
    if path.suffix in (".csv", ".tsv"):
        return _csv(path)
    return _rows(path)


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        for row in reader:
            if None in row or None in row.values():
                raise DataError(f"{path}:{reader.line_num}: expected {len(reader.fieldnames or ())} fields")
            yield f"{path}:{reader.line_num}", row


def _tsv(path: Path, fields: int) -> Iterator[tuple[str, list[str]]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                values = line.rstrip("\n").split("\t")
                if len(values) != fields:
                    raise DataError(
                        f"{path}:{number}: {len(values)} fields with tabs between, expected {fields}"
                    )
                yield f"{path}:{number}", values
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _array(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON array, or of JSON lines, without reading a large file whole."""
    with path.open(encoding="utf-8-sig") as file:
        start = file.read(1 << 20)
        if not start.lstrip().startswith("["):
            yield from _rows(path)
            return
        decoder, rest, number, line = json.JSONDecoder(), start.lstrip()[1:], 0, 1
        line += start[: len(start) - len(start.lstrip())].count("\n")
        while True:
            tidy = re.sub(r"^[\s,]+", "", rest)
            line += rest[: len(rest) - len(tidy)].count("\n")
            if tidy.startswith("]"):
                return
            try:
                row, end = decoder.raw_decode(tidy)
            except json.JSONDecodeError as error:
                if not (more := file.read(1 << 20)):
                    where = f"{path}:{line + error.lineno - 1}"
                    raise DataError(
                        f"{where}: not valid JSON ({error.msg} at column {error.colno})"
                    ) from error
                rest = tidy + more
                continue
            yield f"{path}:{line}", row
            number, line, rest = number + 1, line + tidy[:end].count("\n"), tidy[end:]


@contextmanager
def _at(place: str) -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        raise DataError(f"{place}: no {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{place}: {error}") from error


READERS: dict[str, Callable[[Path, str, Path], Items]] = {
    "tevatron": _read_tevatron,
    "tevatron-v2": _read_tevatron_v2,
    "bge": _read_bge,
    "sentence-transformers": _read_columns,
    "beir": _read_beir,
    "vidore": _read_vidore,
    "dpr": _read_dpr,
    "msmarco": _read_msmarco,
    "questions": _read_questions,
}
