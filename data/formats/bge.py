"""FlagEmbedding's training data: lines {query, pos: [text], neg: [text], pos_scores?, neg_scores?}."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.examples import Examples
from data.formats.rows import scores_of
from data.formats.tables import at, read_rows
from data.formats.training import Items, items_of, one_text, passages_by_id, passages_in
from data.jsonl import write_jsonl
from data.records import Example

_SIDES = ("pos", "neg")


def read(path: Path, split: str, images: Path) -> Items:
    """The passages, named by their texts, and the examples."""
    for place, row in read_rows(path):
        with at(place):
            good, bad = sides = [passages_in(row.get(side), side, "id") for side in _SIDES]
            scores: dict[str, float] = {}
            for name, passages in zip(_SIDES, sides, strict=True):
                ids = [passage.id for passage in passages]
                scores |= scores_of(row.get(f"{name}_scores"), ids, f"{name}_scores")
            yield from items_of(place, row["query"], good, bad, scores=scores)


def write(examples: Examples, out: Path) -> None:
    """Write the texts, and the scores of examples that have all of theirs."""

    def row(example: Example) -> dict[str, Any]:
        sides = {"pos": example.positives, "neg": example.negatives}
        texts = {
            side: [one_text(p) for p in passages_by_id(examples.corpus, ids)] for side, ids in sides.items()
        }
        scores = example.scores or {}
        if all(id_ in scores for ids in sides.values() for id_ in ids):
            texts |= {f"{side}_scores": [scores[id_] for id_ in ids] for side, ids in sides.items()}
        return {"query": example.query, **texts}

    write_jsonl(out, map(row, examples))
