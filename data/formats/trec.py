"""TREC's tables, and BEIR's of judgements: who found what, and what is relevant.

qrels     "query 0 passage relevance", or with BEIR's header "query-id corpus-id score", columns in any order
run       "query Q0 passage rank score name"

Tabs or blanks stand between the fields; an id with blanks needs tabs, and so tabs are written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from data.atomic import open_atomic
from data.errors import DataError
from data.formats.rows import number_of
from data.formats.tables import at, ending_of, fields_of, read_lines, table_line
from data.records import Hit, Passage, Qrels

MAX_GRADE = 1_000_000
"""trec_eval counts in a table of so many entries."""

_COLUMNS = {
    "query": ("query_id", "query", "qid", "q_id", "topic", "topic_id"),
    "iteration": ("iteration", "iter", "q0", "0"),
    "passage": (
        "corpus_id", "doc_id", "docid", "document_id", "docno", "doc", "passage_id", "passage", "pid",
    ),
    "grade": ("score", "relevance", "rel", "label", "grade", "judgement", "judgment"),
}  # fmt: skip
_ROLES = {name: role for role, names in _COLUMNS.items() for name in names}
_BEIR, _TREC = ("query", "passage", "grade"), ("query", "iteration", "passage", "grade")


def load_qrels(path: str | Path) -> Qrels:
    """The relevance judgements of a file. Raises DataError "FILE:LINE: what is wrong"."""
    path, qrels, columns = Path(path), Qrels(), ()
    comma = ending_of(path) == ".csv"
    for number, (place, line) in enumerate(read_lines(path)):
        with at(place):
            fields = fields_of(line, *([len(columns)] if columns else [3, 4]), comma=comma)
            if number == 0 and (columns := _header(fields)):
                continue
            row = dict(zip(columns or (_BEIR if len(fields) == 3 else _TREC), fields, strict=True))
            if fields != line.split("\t") and not re.fullmatch("Q?[0-9]+", row.get("iteration", "0")):
                raise ValueError(f"{len(fields)} fields, the second {fields[1]!r}: ids with blanks need tabs")
            add_judgement(qrels, row["query"], row["passage"], row["grade"])
    if not qrels:
        raise DataError(f"{path}: no judgements")
    return qrels


def add_judgement(qrels: Qrels, query: str, passage: str, grade: object) -> None:
    """Note how relevant a passage is to a query: a whole number; ValueError where it was judged otherwise."""
    if not query.strip() or not passage.strip():
        raise ValueError("a judgement without the id of its query or passage")
    whole = re.fullmatch(r"[+-]?[0-9]+", grade) if isinstance(grade, str) else True
    value = number_of(grade, "relevance") if whole else math.nan
    if value != value or not value.is_integer() or abs(value) > MAX_GRADE:
        raise ValueError(f"relevance {str(grade)[:40]!r}: must be a whole number of at most {MAX_GRADE:,}")
    known = qrels.setdefault(query, {}).setdefault(passage, int(value))
    if known != value:
        raise ValueError(
            f"passage {passage!r} has relevance {known} for query {query!r} already, here {grade}"
        )


def load_run(path: str | Path) -> dict[str, list[Hit]]:
    """The rankings of a run, best first by score, ties as trec_eval breaks them (the later id first).

    The passages have no text; a hit's generation is the name of the run.
    """
    rankings: dict[str, list[Hit]] = {}
    seen: set[tuple[str, str]] = set()
    for place, line in read_lines(Path(path)):
        with at(place):
            query, hit = _run_line(line)
            if (query, hit.passage.id) in seen:
                raise ValueError(f"passage {hit.passage.id!r} stands there twice for query {query!r}")
            seen.add((query, hit.passage.id))
            rankings.setdefault(query, []).append(hit)
    if not rankings:
        raise DataError(f"{path}: no rankings")
    for hits in rankings.values():
        hits.sort(key=lambda hit: (hit.score, hit.passage.id), reverse=True)
    return rankings


def write_run(path: str | Path, rankings: Mapping[str, Sequence[Hit]], name: str) -> None:
    """Write the rankings as a run, with tabs between. DataError for an id that tables cannot hold.

    trec_eval orders by score and ties by id: a hit that scores as the one before it is put just below it.
    """
    name = " ".join(name.split()) or "run"
    with open_atomic(path) as file, at(str(path)):
        for query, hits in rankings.items():
            for rank, (hit, score) in enumerate(zip(hits, _falling(hits), strict=True), start=1):
                file.write(table_line(query, "Q0", hit.passage.id, rank, repr(score), name))


def _falling(hits: Sequence[Hit]) -> Iterator[float]:
    """The scores, each below the one before it in the float32 that trec_eval reads."""
    before = np.float32(np.inf)
    for hit in hits:
        score = number_of(hit.score, "score")
        if np.float32(score) >= before:
            score = float(np.nextafter(before, np.float32(-np.inf)))
        before = np.float32(score)
        yield score


def _header(fields: Sequence[str]) -> tuple[str, ...]:
    """Return the role of each column, where the fields are the words of a header; else nothing."""
    roles = tuple(_ROLES.get(re.sub(r"[- ]", "_", field.strip().lower()), "") for field in fields)
    return roles if sorted(roles) in (sorted(_BEIR), sorted(_TREC)) else ()


def _run_line(line: str) -> tuple[str, Hit]:
    try:
        query, _, passage, rank, score, name = fields_of(line, 6, open_end=True)
    except ValueError as error:
        raise ValueError(f"{error} (query Q0 passage rank score name)") from error
    separate = [query, _, passage, rank, score, name] == line.split("\t")
    if not separate and len(line.split()) == 6 and not re.fullmatch(r"[+-]?[0-9]+", rank):
        raise ValueError(f"rank {rank[:40]!r}: must be a whole number")
    if not separate and (not re.fullmatch(r"[+-]?[0-9]+", rank) or _starts_with_number(name)):
        raise ValueError(f"{len(line.split())} fields, expected 6: ids with blanks need tabs")
    value = _number(score)
    if math.isnan(value):
        raise ValueError(f"score {score[:40]!r}: must be a number")
    return query, Hit(Passage(passage, ""), value, name)


def _starts_with_number(name: str) -> bool:
    first, blank, _ = name.partition(" ")
    return bool(blank) and not math.isnan(_number(first))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
