"""Labels from several retrievers (DRAGON, Lin et al. 2023), and queries cropped from passages.

Each teacher ranks every query: its first ranks are positives, some deeper ones negatives. Stage s trains on
what the first s teachers say, so that teachers are added progressively. Any `Retriever` is a teacher.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from data.corpus import Corpus
from data.errors import ConfigError, DataError
from data.examples import Examples
from data.formats.documents import chunk, count_words
from data.jsonl import write_jsonl
from data.records import Example, Question
from retriever_server.retriever import Retriever
from retriever_server.training.mining import Progress, search_checked, write_in_batches


@dataclass(frozen=True)
class Ranks:
    """Ranks of a teacher that become labels, counted from 1, both ends included."""

    positives: tuple[int, int] = (1, 10)
    negatives: tuple[int, int] = (46, 50)

    def __post_init__(self) -> None:
        (first, last), (low, high) = self.positives, self.negatives
        if not 1 <= first <= last < low <= high:
            given = f"positives {self.positives}, negatives {self.negatives}"
            raise ConfigError(f"ranks: {given}: must be 1 <= first <= last, and the negatives after them")


def label(
    queries: Sequence[Question],
    teachers: Sequence[Retriever],
    corpus: Corpus,
    out: str | Path,
    ranks: Ranks | None = None,
    progress: Progress = iter,
) -> list[Path]:
    """Write `out`/teacher_1.jsonl ..., the labels of each, and `out`/stage_1.jsonl ...; the stages' paths.

    Both are files of examples. A teacher that was asked before is not asked again; killed, it goes on where
    it was. Raises as `mine` does, and DataError where a teacher finds too few passages to have negatives.
    """
    if not teachers:
        raise ConfigError("teachers: must be one retriever or more")
    ranks, out = ranks or Ranks(), Path(out)
    asked = [Example(question.text, (), query_id=question.id) for question in queries]
    labelled = []
    for number, teacher in enumerate(teachers, start=1):
        labelled.append(out / f"teacher_{number}.jsonl")
        _ask(asked, teacher, corpus, labelled[-1], ranks, progress)
    opened = [Examples(path, corpus) for path in labelled]
    stages = [out / f"stage_{number}.jsonl" for number in range(1, len(teachers) + 1)]
    for number, path in enumerate(stages, start=1):
        rows = zip(*opened[:number], strict=True)
        write_jsonl(path, (_joined(each, corpus.content_hash).as_record() for each in rows))
    return stages


def crops(
    corpus: Corpus, per_passage: int = 1, min_words: int = 5, max_words: int = 24, seed: int = 0
) -> Iterator[Example]:
    """Pieces of passages as queries, whole sentences where they are short enough; the passage is positive."""
    provenance = {"corpus": corpus.content_hash, "from": "crops"}
    for passage in corpus:
        pieces = [piece for piece in chunk(passage.text, max_words) if count_words([piece]) >= min_words]
        rng = random.Random(f"{seed} {passage.id}")
        for number in sorted(rng.sample(range(len(pieces)), min(per_passage, len(pieces)))):
            id_ = f"{passage.id}#{number}"
            yield Example(pieces[number], (passage.id,), query_id=id_, provenance=provenance)


def _ask(
    queries: Sequence[Example],
    teacher: Retriever,
    corpus: Corpus,
    out: Path,
    ranks: Ranks,
    progress: Progress,
) -> None:
    generation, depth = teacher.generation, ranks.negatives[1]
    provenance = {"corpus": corpus.content_hash, "generation": generation}
    settings = provenance | {"positives": ranks.positives, "negatives": ranks.negatives}
    of = provenance | {"scores": f"teacher {generation}"}

    def rows(batch: Sequence[Example]) -> Iterator[dict[str, Any]]:
        rankings = search_checked(teacher, batch, depth, corpus, generation)
        for query, hits in zip(batch, rankings, strict=True):
            (first, last), (low, high) = ranks.positives, ranks.negatives
            good, bad = hits[first - 1 : last], hits[low - 1 : high]
            if not good:
                raise DataError(f"{generation}: finds nothing for query {query.query[:60]!r}; leave it out")
            scores = {hit.passage.id: round(float(hit.score), 6) for hit in (*good, *bad)}
            ids = [tuple(hit.passage.id for hit in side) for side in (good, bad)]
            found = Example(query.query, ids[0], ids[1], scores, query.query_id, provenance=of)
            yield found.as_record()

    write_in_batches(queries, rows, out, settings, progress)


def _joined(examples: Sequence[Example], corpus: str) -> Example:
    """Join the labels of several teachers: the best of each first; no negative that one calls good."""
    positives = _in_turns([example.positives for example in examples])
    deeper = _in_turns([example.negatives for example in examples])
    negatives = [id_ for id_ in deeper if id_ not in positives]
    teachers = [example.provenance["generation"] for example in examples]
    first, of = examples[0], {"corpus": corpus, "teachers": teachers}
    return Example(first.query, tuple(positives), tuple(negatives), None, first.query_id, provenance=of)


def _in_turns(lists: Sequence[Sequence[str]]) -> list[str]:
    """[a, b], [c, a] -> [a, c, b]"""
    return list(dict.fromkeys(id_ for id_ in chain(*zip_longest(*lists)) if id_ is not None))
