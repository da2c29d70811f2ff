"""BEIR's folders: corpus.jsonl {"_id", "title", "text"}, queries.jsonl {"_id", "text"}, qrels/SPLIT.tsv.

Passages may have metadata and files, such as {"image"}, queries an image: paths in the folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.atomic import open_atomic
from data.errors import ConfigError, DataError
from data.examples import Examples
from data.formats.rows import first_of, id_of, object_of, parse_passage, passage_row, relative_to, text_of
from data.formats.search_r1 import gold_answers
from data.formats.tables import at, ending_of, read_lines, read_rows, table_line
from data.formats.training import Items, judged_items, query_ids, title_as_text
from data.formats.trec import load_qrels
from data.jsonl import write_jsonl
from data.records import Benchmark, Passage, Question

_IDS, _TEXTS = ("id", "_id", "query_id", "qid"), ("question", "query", "text")


def has_layout(folder: Path) -> bool:
    """Return whether a folder holds queries.jsonl and qrels/, as BEIR's do."""
    return (folder / "queries.jsonl").is_file() and (folder / "qrels").is_dir()


def load(folder: Path, split: str | None) -> Benchmark:
    """The queries that a split (test if none is given) judges, and its qrels.

    A passage with the id of the query itself is excluded, as BEIR's own evaluation does it, unless it is
    judged relevant.
    """
    split = split or "test"
    qrels = load_qrels(_qrels_file(folder, split))
    queries = [query for query in load_queries(folder / "queries.jsonl") if query.id in qrels]
    if not queries:
        raise DataError(f"{folder}: none of its queries has qrels in the split {split!r}")
    itself = {query.id: frozenset([query.id]) for query in queries if qrels[query.id].get(query.id, 0) < 1}
    return Benchmark(queries, qrels, itself)


def passages(folder: Path, split: str | None, images: Path) -> Iterator[tuple[str, Passage]]:
    """The corpus, each passage with its place; a title alone is the text."""
    for place, row in read_rows(folder / "corpus.jsonl"):
        with at(place):
            if first_of(row, "text", "contents") is None:
                row = {**row, "text": ""}
            passage = parse_passage({**row, "id": first_of(row, "_id", "id")})
        yield place, title_as_text(passage.placed(folder))


def load_queries(path: str | Path) -> list[Question]:
    """The queries of a file, with gold answers where it has them.

    Rows of {"id" | "_id", "question" | "query" | "text", "image"?, "golden_answers"?}; .tsv: id, tab, text.
    An image is a path that starts at the folder of the file, and stands for the text or beside it.
    """
    path, queries = Path(path), {}
    for place, query in _tsv_queries(path) if ending_of(path) == ".tsv" else _row_queries(path):
        if not query.id or not (query.text.strip() or query.metadata.get("query_image")):
            raise DataError(f"{place}: no {'text' if query.id else 'id'}")
        if query.id in queries:
            raise DataError(f"{place}: id {query.id!r} stands there twice")
        queries[query.id] = query
    if not queries:
        raise DataError(f"{path}: no queries")
    return list(queries.values())


def read(path: Path, split: str, images: Path) -> Items:
    """The passages, and an example of each query that the split judges."""
    yield from passages(path, split, images)
    benchmark = load(path, split)
    yield from judged_items(str(path / "queries.jsonl"), benchmark.queries, benchmark.qrels)


def write(examples: Examples, out: Path) -> None:
    """Write a folder with the split train; negatives are judged 0."""
    ids = query_ids(examples)
    with open_atomic(out / "qrels" / "train.tsv") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        for i, (id_, example) in enumerate(zip(ids, examples, strict=True)):
            with at(examples.place(i)):
                file.writelines(table_line(id_, passage, 1) for passage in example.positives)
                file.writelines(table_line(id_, passage, 0) for passage in example.negatives)
    queries = (
        {"_id": id_, "text": example.query}
        | ({"image": relative_to(example.query_image, out)} if example.query_image else {})
        for id_, example in zip(ids, examples, strict=True)
    )
    write_jsonl(out / "queries.jsonl", queries)
    rows = (passage_row(passage, out) for passage in examples.corpus)
    write_jsonl(out / "corpus.jsonl", ({"_id": row.pop("id"), **row} for row in rows))


def _qrels_file(folder: Path, split: str) -> Path:
    """The table of a split, or one beside queries.jsonl."""
    path = folder / "qrels" / f"{split}.tsv"
    if not path.is_file() and (folder / "qrels.tsv").is_file():
        return folder / "qrels.tsv"
    if not path.is_file():
        there = sorted(each.stem for each in path.parent.glob("*.tsv"))
        layout = "a folder with corpus.jsonl, queries.jsonl, qrels/"
        allowed = f"one of {', '.join(there)}" if there else layout
        raise ConfigError(f"benchmark {folder}:{split}: must be {allowed}")
    return path


def _row_queries(path: Path) -> Iterator[tuple[str, Question]]:
    for place, row in read_rows(path):
        with at(place):
            metadata = object_of(row.get("metadata"), "metadata")
            if image := text_of(row.get("image"), "image"):
                metadata["query_image"] = str(path.parent / image)
            text = text_of(first_of(row, *_TEXTS), "query")
            yield place, Question(id_of(first_of(row, *_IDS)), text, gold_answers(row), metadata)


def _tsv_queries(path: Path) -> Iterator[tuple[str, Question]]:
    turned = False
    for number, (place, line) in enumerate(read_lines(path)):
        first, _, last = line.partition("\t")
        words = [each.strip().lower().replace("-", "_") for each in (first, last)]
        if number == 0 and any(a in _IDS and b in _TEXTS for a, b in (words, words[::-1])):
            turned = words[1] in _IDS
            continue
        id_, text = (last, first) if turned else (first, last)
        yield place, Question(id_of(id_), text.strip(), ())
