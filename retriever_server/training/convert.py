"""Training data of other projects, from and to ours: a corpus, and examples of ids (`data.examples`).

Empty passages, repetitions, and negatives that are positives of the same query are left out and counted.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.corpus import Corpus
from data.errors import ConfigError, DataError
from data.examples import Examples, OnError, check_example
from data.formats import beir, bge, dpr, labelled, msmarco, pairs, search_r1, tevatron, vidore
from data.formats.rows import passage_row, relative_to
from data.formats.training import Format, one_text, text_id, unnamed
from data.jsonl import write_jsonl
from data.records import Example, Passage

logger = logging.getLogger(__name__)

FORMATS = {
    "tevatron": Format(tevatron.read, tevatron.write),
    "tevatron-v2": Format(tevatron.read_folder, tevatron.write_folder, has_images=True),
    "bge": Format(bge.read, bge.write, has_ids=False),
    "sentence-transformers": Format(pairs.read, pairs.write, has_ids=False),
    "beir": Format(beir.read, beir.write, has_images=True),
    "vidore": Format(vidore.read),
    "dpr": Format(dpr.read, dpr.write),
    "msmarco": Format(msmarco.read, msmarco.write),
    "labelled": Format(labelled.read, has_ids=False),
    "questions": Format(search_r1.read, has_passages=False),
}


@dataclass(frozen=True)
class Converted:
    """Result of a conversion, and counts of what was left out."""

    corpus: Corpus
    examples: Path
    count: int
    left_out: Counter[str]


def convert_from(
    name: str,
    source: str | Path,
    out: str | Path,
    corpus: str | Path | None = None,
    split: str = "train",
    on_error: OnError = "stop",
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Converted:
    """Write `out`/examples.jsonl and, unless the passages are those of `corpus`, `out`/corpus.jsonl.

    In a given corpus passages are found by their id or, where the format has none, by their text. `split`
    is for qrels. Raises DataError "FILE:LINE: what is wrong"; with on_error="skip" examples without a
    positive, with dangling ids or a query_id that was there are left out and counted.
    """
    if name not in FORMATS:
        raise ConfigError(f"format {name!r}: must be one of {', '.join(FORMATS)}")
    form, source, out, left_out = FORMATS[name], Path(source), Path(out), Counter()
    if not source.exists():
        raise ConfigError(f"source = {source}: no such file or folder")
    if name in ("tevatron-v2", "beir", "vidore") and source.is_file():
        raise ConfigError(f"source = {source}: is a file, the format {name} is a folder")
    _refuse_to_replace(source, out, corpus is None)
    if corpus is None:
        if not form.has_passages:
            raise ConfigError(f"format {name!r}: names passages of a corpus, which must be given (--corpus)")
        rows = _distinct(progress(form.read(source, split, out / "images")), out, left_out)
        write_jsonl(out / "corpus.jsonl", _some(rows, f"{source}: holds no passages of the format {name}"))
    passages = Corpus(corpus or out / "corpus.jsonl")
    rename = {} if form.has_ids or not corpus else _ids_by_text(passages)
    items = progress(form.read(source, split, out / "images"))
    provenance = {"corpus": passages.content_hash, "from": name}
    rows = _checked(items, passages, rename, provenance, on_error, left_out)
    rows = (row | _beside(row, out) for row in rows)
    write_jsonl(out / "examples.jsonl", _some(rows, f"{source}: holds no examples", written := Counter()))
    return Converted(passages, out / "examples.jsonl", written["rows"], left_out)


def _refuse_to_replace(source: Path, out: Path, writes_corpus: bool) -> None:
    """ConfigError where the files to write stand there, and no former conversion wrote them."""
    examples, passages = out / "examples.jsonl", out / "corpus.jsonl"
    if writes_corpus and passages.exists() and not examples.exists():
        raise ConfigError(
            f"out = {out}: holds another corpus.jsonl, which would be replaced; name a new folder"
        )
    if any(source.resolve() == each.resolve() for each in (out, examples, passages)):
        raise ConfigError(f"out = {out}: must be another folder than that of source, which would be replaced")


def _beside(row: dict[str, Any], out: Path) -> dict[str, str]:
    """The image of a query as a path that starts at the folder of the examples."""
    return {"query_image": relative_to(row["query_image"], out)} if "query_image" in row else {}


def convert_to(name: str, examples: Examples, out: str | Path) -> None:
    """Write the examples, with the texts of their corpus where the format wants them, to a file or folder."""
    writers = {name: form.write for name, form in FORMATS.items() if form.write}
    if name not in writers:
        raise ConfigError(f"format {name!r}: must be one of {', '.join(writers)}")
    if not FORMATS[name].has_images:
        _refuse_images(name, examples)
    writers[name](examples, Path(out))


def _refuse_images(name: str, examples: Examples) -> None:
    """DataError for what would be empty without its image; a text beside an image can be written."""
    can = " and ".join(each for each, form in FORMATS.items() if form.write and form.has_images)
    said = f"an image without a text, which the format {name} cannot hold; {can} can"
    for index, example in enumerate(examples):
        if example.query_image and not example.query.strip():
            raise DataError(f"{examples.place(index)}: the query is {said}")
    if alone := next((p for p in examples.corpus if p.image and not one_text(p)), None):
        raise DataError(f"{examples.corpus.path}: passage {alone.id!r} is {said}")


def _distinct(
    items: Iterable[tuple[str, Any]], out: Path, left_out: Counter[str]
) -> Iterator[dict[str, Any]]:
    """The rows of a corpus in `out`: each passage once; DataError where an id comes with another text."""
    seen: dict[str, int] = {}
    for place, item in items:
        if not isinstance(item, Passage):
            continue
        if not item.text and not item.files:
            left_out["empty passages"] += 1
            continue
        content = hash((item.title, item.text, *item.files.items()))
        if item.id not in seen:
            seen[item.id] = content
            yield passage_row(item, out)
        elif seen[item.id] != content:
            raise DataError(f"{place}: passage {item.id!r} came with another text or image before")


def _ids_by_text(corpus: Corpus) -> dict[str, str]:
    ids: dict[str, str] = {}
    for passage in corpus:  # of equal texts the first
        ids.setdefault(text_id("", passage.text), passage.id)
        ids.setdefault(text_id("", one_text(passage)), passage.id)
    return ids


def _checked(
    items: Iterable[tuple[str, Any]], corpus: Corpus, rename: Mapping[str, str], provenance: dict[str, Any],
    on_error: OnError, left_out: Counter[str],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    seen: set[str] = set()
    found = ((place, item) for place, item in items if isinstance(item, Example))
    for number, (place, example) in enumerate(found):
        named = replace(example, provenance=provenance, query_id=example.query_id or unnamed(number))
        example = _tidy(named, rename, left_out)
        try:
            if not example.query.strip() and not example.query_image:
                raise ValueError("the query is empty")
            if not example.positives:
                raise ValueError(f"query {example.query[:40]!r} has no positive")
            check_example(example, corpus, seen)
        except ValueError as error:
            if on_error == "stop":
                raise DataError(f"{place}: {error}") from error
            if not left_out["examples"]:
                logger.warning("left out: %s: %s (the first; others are only counted)", place, error)
            left_out["examples"] += 1
            continue
        seen.add(example.query_id)
        yield example.as_record()


def _tidy(example: Example, rename: Mapping[str, str], left_out: Counter[str]) -> Example:
    """Without repetitions, and without negatives that are positives."""
    named = {id_: rename.get(id_, id_) for id_ in (*example.positives, *example.negatives)}
    positives = tuple(dict.fromkeys(named[id_] for id_ in example.positives))
    negatives = tuple(dict.fromkeys(named[id_] for id_ in example.negatives))
    good = tuple(id_ for id_ in negatives if id_ not in positives)
    left_out["negatives that are positives"] += len(negatives) - len(good)
    given = len(example.positives) + len(example.negatives)
    left_out["repetitions"] += given - len(positives) - len(negatives)
    scores = {named[id_]: score for id_, score in (example.scores or {}).items() if id_ in named}
    return replace(example, positives=positives, negatives=good, scores=scores or None)


def _some(
    rows: Iterable[dict[str, Any]], complaint: str, counts: Counter[str] | None = None
) -> Iterator[dict[str, Any]]:
    """The rows, counted; DataError where there are none, so that no empty file is written."""
    counts = Counter() if counts is None else counts
    for row in rows:
        counts["rows"] += 1
        yield row
    if not counts["rows"]:
        raise DataError(complaint)
