"""Labelled texts, {text, label}, as examples: a text of the same label is found, one of another is not.

As in Gecko (Lee et al. 2024, section 3.3), all texts of a triple end in an id of its own: in a batch, texts
of one label that belong to other triples are then told apart, and no positives that were missed.
"""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path

from data.errors import DataError
from data.formats.rows import text_of
from data.formats.tables import at, read_rows
from data.formats.training import Items, items_of, passage_of


def read(path: Path, split: str, images: Path) -> Items:
    """An example of each text whose label another has, too; what goes with it is drawn, always alike."""
    rows: list[tuple[str, str, str]] = []
    by_label: dict[str, list[str]] = defaultdict(list)
    for place, row in read_rows(path):
        with at(place):
            text, label = text_of(row.get("text"), "text"), str(row["label"])
        rows.append((place, text, label))
        by_label[label].append(text)
    if len(by_label) < 2:
        raise DataError(f"{path}: has {len(by_label)} labels; two are needed to tell apart")
    rng, labels = random.Random(0), sorted(by_label)
    for number, (place, text, label) in enumerate(rows):
        same = [each for each in by_label[label] if each != text]
        if same:
            other = rng.choice([each for each in labels if each != label])
            chosen = rng.choice(same), rng.choice(by_label[other])
            good, bad = (passage_of(None, "", f"{each} [{number}]") for each in chosen)
            yield from items_of(place, f"{text} [{number}]", [good], [bad])
