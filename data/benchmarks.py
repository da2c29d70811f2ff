"""Test collections as their makers hand them out, and TREC's files of rankings and judgements.

    BEIR       corpus.jsonl {"_id", "title", "text", "image"?}, queries.jsonl {"_id", "text", "image"?},
               qrels/SPLIT.tsv; an image is a path in the folder
    BRIGHT     documents/DOMAIN-*.parquet {id, content},
               examples/DOMAIN-*.parquet {id, query, gold_ids, gold_ids_long, excluded_ids};
               long_documents/DOMAIN-*.parquet where there are any
    ViDoRe     corpus/, queries/ and qrels/SPLIT-*.parquet, with pictures (see `vidore`)
    TREC       a run: "query Q0 passage rank score name"; qrels: "query 0 passage relevance"

One is named as FOLDER:PART: the part is a split of BEIR's or ViDoRe's (test without one), a domain of
BRIGHT's, such as `biology`, or `biology-long` for whole documents.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.errors import ConfigError, DataError
from data.jsonl import atomic_write, numbered_jsonl
from data.parquet import parts, read_parquet, relative_to
from data.qrels import Qrels, load_qrels, load_queries
from data.records import Hit, Passage, Question
from data.vidore import is_vidore, load_vidore, vidore_passages

logger = logging.getLogger(__name__)

_LONG = "-long"
_BRIGHT_TASKS = {
    "pony": ("{} question", "passages", "question"),
    "leetcode": ("coding problem", "examples", "problem"),
    "aops": ("Math problem", "examples", "problem"),
    "theoremqa_questions": ("Math problem", "examples", "problem"),
    "theoremqa_theorems": ("Math problem", "theorems", "problem"),
}
_BRIGHT_POST = ("{} post", "passages", "post")


@dataclass(frozen=True)
class Benchmark:
    """The queries of a test collection and what is known about them; its corpus is read apart."""

    queries: list[Question]
    qrels: Qrels
    excluded: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Query id -> passages that are taken out of its ranking before it is judged."""
    instruction: str = ""
    """What instructed encoders are told to do; BRIGHT's, by domain."""


def load_benchmark(name: str) -> Benchmark:
    """The queries, qrels and exclusions of FOLDER[:PART]; ConfigError where there is no such collection.

    BEIR: a passage with the id of the query itself is excluded, as BEIR's own evaluation does it,
    unless it is judged relevant. BRIGHT: what `excluded_ids` lists.
    """
    folder, part = _place(name)
    if _is_bright(folder):
        return _load_bright(folder, part)
    if is_vidore(folder):
        return Benchmark(*load_vidore(folder, part or "test"))
    qrels = load_qrels(_beir_qrels(folder, part))
    queries = [query for query in load_queries(folder / "queries.jsonl") if query.id in qrels]
    if not queries:
        raise DataError(f"{folder}: none of its queries has qrels in the split {part or 'test'!r}")
    itself = {query.id: frozenset([query.id]) for query in queries if qrels[query.id].get(query.id, 0) < 1}
    return Benchmark(queries, qrels, itself)


def is_benchmark(name: str | Path) -> bool:
    """Whether FOLDER[:PART] holds a collection of BEIR's, BRIGHT's or ViDoRe's form."""
    folder, _ = _place(str(name))
    return (
        _is_bright(folder)
        or is_vidore(folder)
        or ((folder / "queries.jsonl").is_file() and (folder / "qrels").is_dir())
    )


def benchmark_passages(name: str, beside: str | Path = "") -> Iterator[dict[str, Any]]:
    """The corpus of FOLDER[:PART], as the rows of ours: {"id", "title", "text", "image"}.

    beside: the folder of the corpus that is written; paths of images start there, and pictures out of
    parquet files go into its subfolder `images`. A passage of a title alone has it as its text; those
    without any text or image are left out and counted.
    """
    folder, part = _place(name)
    beside, empty = Path(beside), 0
    for passage in _passages(folder, part, beside):
        title, text = passage.title.strip(), passage.text.strip()
        if title or text or passage.image:
            row = {"id": passage.id, "title": title if text else "", "text": text or title}
            yield row | ({"image": relative_to(passage.image, beside)} if passage.image else {})
        else:
            empty += 1
    if empty:
        logger.warning("%s: %d passages without any text are left out", name, empty)


def _passages(folder: Path, part: str | None, beside: Path) -> Iterator[Passage]:
    if _is_bright(folder):
        return _bright_passages(folder, part)
    if is_vidore(folder):
        return vidore_passages(folder, beside / "images", part or "test")
    return _beir_passages(folder)


def without_excluded(
    rankings: Mapping[str, Sequence[Hit]], excluded: Mapping[str, frozenset[str]], top_k: int
) -> dict[str, list[Hit]]:
    """The best `top_k` hits of each query that are not excluded for it."""
    none: frozenset[str] = frozenset()
    return {
        id_: [hit for hit in hits if hit.passage.id not in excluded.get(id_, none)][:top_k]
        for id_, hits in rankings.items()
    }


def load_run(path: str | Path) -> dict[str, list[Hit]]:
    """The rankings of a TREC run, best first by score, ties as trec_eval breaks them (the later id first).

    The passages have no text; a hit's generation is the name of the run.
    """
    rankings: dict[str, list[Hit]] = {}
    seen: set[tuple[str, str]] = set()
    for number, fields in _fields(Path(path)):
        query, _, passage, _, score, name = fields
        try:
            value = float(score)
        except ValueError:
            value = math.nan
        if math.isnan(value):
            raise DataError(f"{path}:{number}: score {score[:40]!r}: must be a number")
        if (query, passage) in seen:
            raise DataError(f"{path}:{number}: passage {passage!r} stands there twice for query {query!r}")
        seen.add((query, passage))
        rankings.setdefault(query, []).append(Hit(Passage(passage, ""), value, name))
    if not rankings:
        raise DataError(f"{path}: no rankings")
    for hits in rankings.values():
        hits.sort(key=lambda hit: (hit.score, hit.passage.id), reverse=True)
    return rankings


def write_qrels(path: str | Path, qrels: Qrels) -> None:
    """Write judgements as TREC does: query 0 passage relevance."""
    atomic_write(path, "".join(f"{q} 0 {p} {r}\n" for q, of in qrels.items() for p, r in of.items()))


def _place(name: str) -> tuple[Path, str | None]:
    if Path(name).is_dir():
        return Path(name), None
    folder, colon, part = name.rpartition(":")
    if colon and Path(folder).is_dir():
        return Path(folder), part
    return Path(name), None


def _beir_qrels(folder: Path, split: str | None) -> Path:
    path = folder / "qrels" / f"{split or 'test'}.tsv"
    if not path.is_file():
        there = sorted(each.stem for each in path.parent.glob("*.tsv"))
        allowed = (
            f"one of {', '.join(there)}" if there else "a folder with corpus.jsonl, queries.jsonl, qrels/"
        )
        raise ConfigError(f"benchmark {f'{folder}:{split}' if split else str(folder)!r}: must be {allowed}")
    return path


def _beir_passages(folder: Path) -> Iterator[Passage]:
    path = folder / "corpus.jsonl"
    for number, row in numbered_jsonl(path):
        id_ = row.get("_id", row.get("id"))
        if not isinstance(id_, str | int) or id_ == "":
            raise DataError(f'{path}:{number}: no "_id"')
        image = str(folder / str(row["image"])) if row.get("image") else ""
        yield Passage(str(id_), str(row.get("text") or ""), str(row.get("title") or ""), image=image)


def _is_bright(folder: Path) -> bool:
    return (folder / "examples").is_dir() and (folder / "documents").is_dir()


def _load_bright(folder: Path, part: str | None) -> Benchmark:
    domain, long = _domain(folder, part)
    rows = list(_parquet(folder / "examples", domain))
    queries = [Question(str(row["id"]), row["query"], ()) for row in rows]
    gold = "gold_ids_long" if long else "gold_ids"
    qrels = {str(row["id"]): dict.fromkeys(map(str, row[gold]), 1) for row in rows}
    excluded = {
        str(row["id"]): frozenset(map(str, row.get("excluded_ids") or ())) - {"N/A"}  # their way to say none
        for row in rows
    }
    for id_, ids in excluded.items():
        if both := ids & qrels[id_].keys():
            raise DataError(f"{folder}: query {id_!r}: {min(both)!r} is both relevant and excluded")
    what, wanted, answered = _BRIGHT_TASKS.get(domain, _BRIGHT_POST)
    wanted = "documents" if long else wanted
    what = what.format(domain)
    instruction = f"Given a {what}, retrieve relevant {wanted} that help answer the {answered}"
    return Benchmark(queries, qrels, {id_: ids for id_, ids in excluded.items() if ids}, instruction)


def _bright_passages(folder: Path, part: str | None) -> Iterator[Passage]:
    domain, long = _domain(folder, part)
    for row in _parquet(folder / ("long_documents" if long else "documents"), domain):
        yield Passage(str(row["id"]), row["content"])


def _domain(folder: Path, part: str | None) -> tuple[str, bool]:
    domain = (part or "").removesuffix(_LONG)
    there = sorted({path.name.rpartition("-of-")[0].rpartition("-")[0] for path in _files(folder, "")})
    if domain not in there:
        raise ConfigError(f"benchmark {folder}:{part or ''}: must name a domain, one of {', '.join(there)}")
    return domain, (part or "").endswith(_LONG)


def _files(folder: Path, domain: str) -> list[Path]:
    return sorted((folder / "examples").glob(f"{domain}*.parquet"))


def _parquet(folder: Path, domain: str) -> Iterator[dict[str, Any]]:
    return (row for path in parts(folder, domain) for row in read_parquet(path))


def _fields(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The six fields of each line of a run, with its number."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                if len(fields := line.strip().split(maxsplit=5)) != 6:
                    expected = "query Q0 passage rank score name"
                    raise DataError(f"{path}:{number}: {len(fields)} fields, expected 6 ({expected})")
                yield number, fields
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
