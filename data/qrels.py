"""Test collections: queries, and which passages are relevant to them (qrels).

queries   .jsonl {"id" | "_id", "question" | "query" | "text", "image"?, "golden_answers"?}, or .tsv: id, tab,
          text; an image is a path that starts at the folder of the file, and stands for the text or beside it
qrels     a table "query-id corpus-id score" with that header (BEIR), or TREC's "query 0 passage relevance"
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.jsonl import numbered_jsonl
from data.records import Question

Qrels = dict[str, dict[str, int]]
"""Query id -> passage id -> relevance; 0 and below is judged and not relevant."""

_IDS, _TEXTS = ("id", "_id", "query_id"), ("question", "query", "text")
_GOLDS = ("golden_answers", "gold_answers", "answers")


def load_qrels(path: str | Path) -> Qrels:
    """The relevance judgements of a file. Raises DataError "FILE:LINE: what is wrong"."""
    qrels: Qrels = {}
    for number, line in _lines(Path(path)):
        fields = line.split()
        if number == 1 and not fields[-1].lstrip("-").isdigit():
            continue  # a header
        if len(fields) not in (3, 4):
            raise DataError(
                f"{path}:{number}: {len(fields)} fields, expected 3 (query-id corpus-id score) or 4"
            )
        query, passage, relevance = fields[0], fields[-2], fields[-1]
        if not relevance.lstrip("-").isdigit():
            raise DataError(f"{path}:{number}: relevance {relevance[:40]!r}: must be a whole number")
        qrels.setdefault(query, {})[passage] = int(relevance)
    if not qrels:
        raise DataError(f"{path}: no judgements")
    return qrels


def load_queries(path: str | Path) -> list[Question]:
    """The queries of a file, with gold answers where it has them. Raises DataError as above."""
    path = Path(path)
    rows = _tsv_queries(path) if path.suffix == ".tsv" else _json_queries(path)
    queries: dict[str, Question] = {}
    for number, query in rows:
        if not query.id or not (query.text.strip() or query.metadata.get("query_image")):
            raise DataError(f"{path}:{number}: no {'id' if not query.id else 'text'}")
        if query.id in queries:
            raise DataError(f"{path}:{number}: id {query.id!r} stands there twice")
        queries[query.id] = query
    if not queries:
        raise DataError(f"{path}: no queries")
    return list(queries.values())


def _json_queries(path: Path) -> Iterator[tuple[int, Question]]:
    for number, record in numbered_jsonl(path):
        id_, text = _first(record, _IDS, ""), _first(record, _TEXTS, "")
        golds = _first(record, _GOLDS, [])
        golds = [golds] if isinstance(golds, str) else golds
        if not isinstance(text, str) or not isinstance(golds, list):
            raise DataError(f"{path}:{number}: the query must be a string, its gold answers a list")
        metadata = dict(record.get("metadata") or {})
        if image := record.get("image"):
            metadata["query_image"] = str(path.parent / str(image))
        yield number, Question(str(id_), text, tuple(map(str, golds)), metadata)


def _tsv_queries(path: Path) -> Iterator[tuple[int, Question]]:
    for number, line in _lines(path):
        id_, _, text = line.partition("\t")
        yield number, Question(id_.strip(), text.strip(), ())


def _first(record: dict[str, Any], names: tuple[str, ...], default: Any) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), default)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, from 1."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
