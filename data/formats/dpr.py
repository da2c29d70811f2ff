"""DPR's training data: {question, answers, positive_ctxs, hard_negative_ctxs, negative_ctxs}, by lines."""

from __future__ import annotations

import json
from pathlib import Path

from data.atomic import open_atomic
from data.examples import Examples
from data.formats.rows import answers_of
from data.formats.tables import at, read_rows
from data.formats.training import Items, items_of, passages_by_id, passages_in

_NAMES = ("positive_ctxs", "hard_negative_ctxs", "negative_ctxs")


def read(path: Path, split: str, images: Path) -> Items:
    """The passages and the examples."""
    for place, row in read_rows(path):
        with at(place):
            good, hard, easy = (passages_in(row.get(name), name, "passage_id", "psg_id") for name in _NAMES)
            answers = answers_of(row.get("answers"), "answers")
            yield from items_of(place, row["question"], good, hard + easy, answers=answers)


def write(examples: Examples, out: Path) -> None:
    """Write an array, a line an example."""
    with open_atomic(out) as file:
        for i, example in enumerate(examples):
            sides = {"positive_ctxs": example.positives, "hard_negative_ctxs": example.negatives}
            texts = {
                name: [
                    {"title": p.title, "text": p.text, "passage_id": p.id}
                    for p in passages_by_id(examples.corpus, ids)
                ]
                for name, ids in sides.items()
            }
            row = {"question": example.query, "answers": list(example.answers), **texts, "negative_ctxs": []}
            file.write(("[\n" if i == 0 else ",\n") + json.dumps(row, ensure_ascii=False))
        file.write("\n]\n")
