"""Our examples as other projects read them: the formats of `readers.py`, written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.examples import Example, Examples
from data.jsonl import open_atomic, write_jsonl
from data.parquet import relative_to
from data.records import Passage


def _write_tevatron(examples: Examples, out: Path) -> None:
    def row(example: Example) -> dict[str, Any]:
        sides = {"positive_passages": example.positives, "negative_passages": example.negatives}
        texts = {name: [_as_docid(p) for p in _passages(examples, ids)] for name, ids in sides.items()}
        return {"query_id": example.query_id, "query": example.query, **texts}

    write_jsonl(out, map(row, examples))


def _write_tevatron_v2(examples: Examples, out: Path) -> None:
    corpus = (_as_docid(p) | {"image": relative_to(p.image, out) or None} for p in examples.corpus)
    write_jsonl(out / "corpus.jsonl", corpus)
    rows = (
        {
            "query_id": example.query_id or str(i),
            "query_text": example.query,
            "query_image": relative_to(example.query_image, out) or None,
            "positive_document_ids": list(example.positives),
            "negative_document_ids": list(example.negatives),
        }
        for i, example in enumerate(examples)
    )
    write_jsonl(out / "train.jsonl", rows)


def _as_docid(passage: Passage) -> dict[str, Any]:
    return {"docid": passage.id, "title": passage.title, "text": passage.text}


def _write_bge(examples: Examples, out: Path) -> None:
    def row(example: Example) -> dict[str, Any]:
        sides = {"pos": example.positives, "neg": example.negatives}
        texts = {side: [one_text(p) for p in _passages(examples, ids)] for side, ids in sides.items()}
        scores = example.scores or {}
        if all(id_ in scores for ids in sides.values() for id_ in ids):
            texts |= {f"{side}_scores": [scores[id_] for id_ in ids] for side, ids in sides.items()}
        return {"query": example.query, **texts}

    write_jsonl(out, map(row, examples))


def _write_columns(examples: Examples, out: Path) -> None:
    """One row a positive; as many negatives as every example has; labels where all have their scores."""
    count = min(len(example.negatives) for example in examples)
    used = [(example, (*example.positives, *example.negatives[:count])) for example in examples]
    labels = all(id_ in (example.scores or {}) for example, ids in used for id_ in ids)

    def rows() -> Iterator[dict[str, Any]]:
        for example, _ in used:
            for positive in example.positives:
                ids = (positive, *example.negatives[:count])
                names = ("positive", *(f"negative_{i}" for i in range(1, count + 1)))
                texts = [one_text(passage) for passage in _passages(examples, ids)]
                label = {"label": [(example.scores or {})[id_] for id_ in ids]} if labels else {}
                yield {"anchor": example.query, **dict(zip(names, texts, strict=True)), **label}

    write_jsonl(out, rows())


def _write_beir(examples: Examples, out: Path) -> None:
    corpus = ({"_id": p.id, "title": p.title, "text": p.text} | _image(p.image, out) for p in examples.corpus)
    write_jsonl(out / "corpus.jsonl", corpus)
    ids = [example.query_id or str(i) for i, example in enumerate(examples)]
    queries = (
        {"_id": id_, "text": e.query} | _image(e.query_image, out)
        for id_, e in zip(ids, examples, strict=True)
    )
    write_jsonl(out / "queries.jsonl", queries)
    with open_atomic(out / "qrels" / "train.tsv") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        for id_, example in zip(ids, examples, strict=True):
            file.writelines(f"{id_}\t{passage}\t1\n" for passage in example.positives)
            file.writelines(f"{id_}\t{passage}\t0\n" for passage in example.negatives)


def _write_dpr(examples: Examples, out: Path) -> None:
    with open_atomic(out) as file:
        for i, example in enumerate(examples):
            sides = {"positive_ctxs": example.positives, "hard_negative_ctxs": example.negatives}
            texts = {
                name: [
                    {"title": p.title, "text": p.text, "passage_id": p.id} for p in _passages(examples, ids)
                ]
                for name, ids in sides.items()
            }
            row = {"question": example.query, "answers": list(example.answers), **texts, "negative_ctxs": []}
            file.write(("[\n" if i == 0 else ",\n") + json.dumps(row, ensure_ascii=False))
        file.write("\n]\n")


def _context(passage: Passage) -> dict[str, Any]:
    return {"title": passage.title, "text": passage.text, "passage_id": passage.id}


def _write_msmarco(examples: Examples, out: Path) -> None:
    """Triples of ids; an example without negatives cannot be told, and is refused."""
    with open_atomic(out / "collection.tsv") as file:
        file.writelines(f"{p.id}\t{_flat(one_text(p))}\n" for p in examples.corpus)
    with open_atomic(out / "queries.tsv") as queries, open_atomic(out / "triples.tsv") as triples:
        for i, example in enumerate(examples):
            if not example.negatives:
                raise DataError(f"{examples.place(i)}: has no negatives, and triples cannot say that")
            id_ = example.query_id or str(i)
            queries.write(f"{id_}\t{_flat(example.query)}\n")
            for good in example.positives:
                triples.writelines(f"{id_}\t{good}\t{bad}\n" for bad in example.negatives)


def _passages(examples: Examples, ids: Iterable[str]) -> list[Passage]:
    return [passage for id_ in ids if (passage := examples.corpus.get(id_))]


def _image(image: str, out: Path) -> dict[str, str]:
    return {"image": relative_to(image, out)} if image else {}


def _flat(text: str) -> str:
    return " ".join(text.split())


def one_text(passage: Passage) -> str:
    """For formats without titles."""
    return f"{passage.title} {passage.text}" if passage.title else passage.text


WRITERS: dict[str, Callable[[Examples, Path], None]] = {
    "tevatron": _write_tevatron,
    "tevatron-v2": _write_tevatron_v2,
    "bge": _write_bge,
    "sentence-transformers": _write_columns,
    "beir": _write_beir,
    "dpr": _write_dpr,
    "msmarco": _write_msmarco,
}

WITH_IMAGES = ("tevatron-v2", "beir")
"""The formats that can name an image."""
