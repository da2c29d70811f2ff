"""The examples of `data.examples` as data sets for the trainers of sentence-transformers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from data.corpus import Corpus
from data.errors import ConfigError, DataError, require
from data.examples import Examples
from data.records import Example, Input, Item, Passage
from retriever_server.encoders.image_inputs import input_kind

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

Form = Literal["tuple", "pair", "list"]
_MOST_CHARACTERS = 100_000
"""Longer texts are cut before the tokenizer sees them."""


def content_key(given: Input, *files: str) -> int:
    """Hash a query or passage by its words and files: the same whatever its case and its blanks."""
    text = given.text if isinstance(given, Item) else given
    if isinstance(given, Item):
        files = (str(given.image), *files)
    return hash((" ".join(text.lower().split()), *filter(None, files)))


def passage_key(passage: Passage) -> int:
    """Hash a passage: equal for those of the same text and files."""
    return content_key(passage.text, *passage.files.values())


class PassageKeys:
    """The keys of the passages of a corpus (`passage_key`), each read once."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.known: dict[int, int] = {}

    def __call__(self, position: int) -> int:
        if position not in self.known:
            self.known[position] = passage_key(self.corpus[position])
        return self.known[position]

    def __reduce__(self) -> Any:
        return PassageKeys, (self.corpus,)  # hashes of texts are other ones in another process


def title_and_text(passage: Passage) -> str:
    """The text of a passage where no `EncodingSpec` says another."""
    return f"{passage.title}\n{passage.text}".strip()


def as_dataset(
    examples: Examples,
    render: Callable[[Passage], Input] = title_and_text,
    negatives: int = 0,
    form: Form = "tuple",
    labels: bool = False,
    labels_of: Literal["teacher", "any"] = "teacher",
    weights: bool = False,
    draws: int = 1,
    seed: int = 0,
    reads_files: bool = True,
) -> Dataset:
    """The examples as a data set for the trainers of sentence-transformers; texts are read batch by batch.

    form     tuple   anchor, positive, negative_1 .. negative_n; with `labels`, label: the 1 + n scores
             pair    query, passage, label: 1 or 0, with `labels` the passage's score; 1 + n rows a draw
             list    query, docs, label: lists of at most 1 + n passages and their labels
    render   what of a passage is encoded: `EncodingSpec.render` of what will serve; images stay unread
    weights  label: the weight of the example and those of its negatives (`provenance.weight`,
             `negative_weights`), 1 where none is said; tuples without `labels`
    draws    how often an example stands there. Each time another positive comes up and other negatives, in
             their order; without `negatives` it is the first of each.
    labels_of   teacher: DataError where the scores are those of the retriever that mined the example
    reads_files      whether the model reads images (or sounds, ...): DataError for such a query where not

    Where a tuple without labels lacks negatives, random passages fill it. Where scores are due and too few
    passages have one, the example is left out, which is logged. Raises DataError if none is left.
    """
    from datasets import Dataset

    if negatives < 0 or draws < 1:
        raise ConfigError(f"negatives = {negatives}, draws = {draws}: must be >= 0 and >= 1")
    require(form in _QUERY, "form", form, f"one of {', '.join(_QUERY)}")
    rng = np.random.default_rng(seed)
    columns: dict[str, list] = {}
    asked: dict[int, int] = {}
    due = 1 + negatives if form == "tuple" else 1
    left_out = 0
    for draw in range(draws):
        for index, example in enumerate(_checked(examples, labels and labels_of, reads_files)):
            asked[index] = content_key(example.query, example.query_image)
            chosen = _draw(example, negatives, draw, labels)
            if labels and len(chosen) < due:
                left_out += 1
                continue
            for row in _rows(form, examples.corpus, example, chosen, negatives, labels, rng, weights):
                for name, value in ({_QUERY[form]: index} | row).items():
                    columns.setdefault(name, []).append(value)
    if left_out:
        what = f"{left_out // draws} of {len(examples)} examples have too few passages with a score"
        logger.warning("%s: %s, and are left out", examples.path, what)
    if not columns:
        raise DataError(f"{examples.path}: no example has a score for a positive and {negatives} negatives")
    return Dataset.from_dict(columns).with_transform(
        _Resolve(examples, render, PassageKeys(examples.corpus), asked)
    )


def _checked(
    examples: Examples, labels_of: Literal["teacher", "any", False], reads_files: bool
) -> Iterator[Example]:
    """The examples; DataError at a query that the model cannot read, or scores that may be no labels."""
    for index, example in enumerate(examples):
        if example.query_image and not reads_files:
            raise DataError(
                f"{examples.place(index)}: the query holds an image, and the model reads no images"
            )
        if labels_of == "teacher" and example.is_scored_by_miner:
            raise DataError(
                f"{examples.place(index)}: its scores are those of the retriever that mined it "
                f"({example.provenance['scores']}), no teacher's: mine with --teacher, or say labels_of: any"
            )
        yield example


_QUERY = {"tuple": "anchor", "pair": "query", "list": "query"}


def _draw(example: Example, negatives: int, draw: int, scored: bool) -> list[str]:
    """The ids of one positive and at most so many negatives; none where scores are due and missing."""
    good, bad = list(example.positives), list(example.negatives)
    if scored:
        good, bad = ([id_ for id_ in ids if id_ in (example.scores or {})] for ids in (good, bad))
    if not good:
        return []
    start = draw * negatives % max(1, len(bad))
    return [good[draw % len(good)], *(bad[start:] + bad[:start])[:negatives]]


def _rows(
    form: Form,
    corpus: Corpus,
    example: Example,
    chosen: list[str],
    negatives: int,
    labels: bool,
    rng: Any,
    weights: bool = False,
) -> list[dict[str, Any]]:
    """The rows of an example whose positive and negatives are chosen: positions of passages, and labels."""
    positions, scores = corpus.positions(chosen).tolist(), example.scores or {}
    values = [float(scores[id_]) if labels else float(rank == 0) for rank, id_ in enumerate(chosen)]
    if form == "list":
        return [{"docs": positions, "label": values}]
    if form == "pair":
        each = zip(positions, values, strict=True)
        return [{"passage": position, "label": value} for position, value in each]
    if len(positions) <= negatives:
        _fill(positions, corpus, example, negatives, rng)
    row = {"positive": positions[0]}
    row |= {f"negative_{i}": position for i, position in enumerate(positions[1:], start=1)}
    values = _weights(example, chosen, negatives) if weights else values
    return [row | ({"label": values} if labels or weights else {})]


def _weights(example: Example, chosen: list[str], negatives: int) -> list[float]:
    """The weight of an example and those of its negatives; random ones that fill it up weigh 1.   (1 + N,)"""
    of = example.provenance.get("negative_weights", {})
    found = [float(example.provenance.get("weight", 1.0)), *(float(of.get(id_, 1.0)) for id_ in chosen[1:])]
    return [*found, *[1.0] * (1 + negatives - len(found))]


def _fill(positions: list[int], corpus: Corpus, example: Example, negatives: int, rng: Any) -> None:
    """Add random passages that are no positives, so that there are as many negatives as asked for."""
    never = {*corpus.positions((*example.positives, *example.negatives)).tolist()}
    if len(never) + 1 + negatives - len(positions) > len(corpus):
        raise DataError(f"{corpus.path}: {len(corpus)} passages are too few for {negatives} negatives")
    while len(positions) <= negatives:
        position = int(rng.integers(len(corpus)))
        if position not in never:
            never.add(position)
            positions.append(position)


@dataclass(frozen=True)
class _Resolve:
    """The transform of a data set from positions to items; it keeps the columns' names."""

    examples: Any
    """`Examples`, or None where all columns are passages."""
    render: Callable[[Passage], Input]
    keys: PassageKeys
    asked: dict[int, int] = field(default_factory=dict)
    """Position of a query -> its `content_key`."""

    def __deepcopy__(self, memo: Any) -> _Resolve:
        return self  # data sets copy their transform; this one never changes, and its files stay open

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        return {name: [self._value(name, value) for value in values] for name, values in batch.items()}

    def key(self, name: str, value: Any) -> Any:
        """The same for the same text or image: of a query, or of the passage at a position. Renders none."""
        return self.asked[value] if name in _QUERY.values() else self.keys(value)

    def _value(self, name: str, value: Any) -> Any:
        if name == "label":
            return value
        if isinstance(value, list):
            return [self._value(name, position) for position in value]
        is_query = name in _QUERY.values()
        item = self.examples[value].asked if is_query else self.render(self.keys.corpus[value])
        if isinstance(item, str):
            return item[:_MOST_CHARACTERS]
        return replace(item, text=item.text[:_MOST_CHARACTERS])


def passages_as_dataset(corpus: Corpus, render: Callable[[Passage], Input]) -> Dataset:
    """The passages of a corpus as a data set of one column, read batch by batch."""
    from datasets import Dataset

    transform = _Resolve(None, render, PassageKeys(corpus))
    return Dataset.from_dict({"text": list(range(len(corpus)))}).with_transform(transform)


def split_by_pair(
    dataset: Any,
    examples: Examples,
    render: Callable[[Passage], Input],
    shares: Mapping[str, float],
    weight: float,
) -> dict[str, tuple[Any, float]]:
    """The rows of each kind of pair ("text > image"), and the weight of their batches.

    dataset: of `as_dataset`, form tuple. shares: of kinds; by their number of rows if empty; together they
    weigh `weight`. Raises ConfigError where `shares` does not name just the kinds that there are.
    """
    plain = dataset.to_dict()
    rows: dict[str, list[int]] = {}
    for row, (query, passage) in enumerate(zip(plain["anchor"], plain["positive"], strict=True)):
        answer = render(examples.corpus[passage])
        rows.setdefault(f"{input_kind(examples[query].asked)} > {input_kind(answer)}", []).append(row)
    if shares and set(shares) != set(rows):
        raise ConfigError(f"train.shares: names {', '.join(shares)}; the pairs are {', '.join(rows)}")
    of = shares or {kind: len(each) for kind, each in rows.items()}
    total = sum(of.values())
    return {kind: (dataset.select(each), weight * of[kind] / total) for kind, each in rows.items()}
