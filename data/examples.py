"""Training examples of retrievers: queries with the ids of good and of bad passages, in JSON lines.

    {"query_id": "q1", "query": "capital of Italy", "positives": ["0"], "negatives": ["7", "3"],
     "scores": {"0": 9.1, "7": 2.5}, "answers": ["Rome"], "provenance": {"corpus": "f00d..."}}

Only query (or "query_image", a file) and positives must be there. Texts and images stay where they are and
are read when a batch needs them.
"""

from __future__ import annotations

import logging
import mmap
import os
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from data.corpus import Corpus
from data.errors import DataError
from data.formats.rows import answers_of, id_of, ids_of, number_of, object_of, text_of
from data.jsonl import parse_line
from data.records import Example

logger = logging.getLogger(__name__)

OnError = Literal["stop", "skip"]


def parse_example(record: Mapping[str, Any], folder: str | Path = "") -> Example:
    """The example in one record of a file in `folder`; ValueError says what is wrong with it."""
    if unknown := set(record) - set(Example.__dataclass_fields__):
        allowed = f"{', '.join(Example.__dataclass_fields__)} (`sleuth convert` reads other formats)"
        raise ValueError(f'unknown key "{min(unknown)}"; allowed: {allowed}')
    query, image = (text_of(record.get(name), name) for name in ("query", "query_image"))
    if not (query.strip() or image):
        raise ValueError('no "query" and no "query_image", or an empty one')
    scores = object_of(record.get("scores"), "scores")
    example = Example(
        query=query,
        positives=ids_of(record.get("positives"), "positives"),
        negatives=ids_of(record.get("negatives"), "negatives"),
        scores={id_: number_of(score, "scores") for id_, score in scores.items()} or None,
        query_id=id_of(record.get("query_id"), "query_id"),
        answers=answers_of(record.get("answers"), "answers"),
        provenance=object_of(record.get("provenance"), "provenance"),
        query_image=os.path.join(folder, image) if image else "",
    )
    if not example.positives:
        raise ValueError(f"query {query[:40]!r} has no positive")
    if both := set(example.positives) & set(example.negatives):
        raise ValueError(f"passage {min(both)!r} is a positive and a negative of query {query[:40]!r}")
    return example


class Examples(Sequence[Example]):
    """The examples of a file, by offset through a memory map, checked against their corpus."""

    def __init__(self, path: str | Path, corpus: Corpus, on_error: OnError = "stop") -> None:
        """Open and check `path`. on_error="skip" leaves wrong examples out and counts them in `skipped`.

        Raises DataError "FILE:LINE: what is wrong": no positive, an empty query, a query_id twice, a passage
        twice or not in the corpus; and, whatever on_error says, a line that is not JSON, and a
        `provenance.corpus` that is not the hash of this corpus. Queries with the text of another stay, and
        are counted in `repeated`: their batches should be sampled without duplicates.
        """
        self.path, self.corpus, self.on_error = Path(path), corpus, on_error
        self.skipped = self.repeated = 0
        self.query_styles: set[str] = set()
        """Styles of the queries, where examples of an agent's searches say one."""
        self._bytes = _map(self.path)
        self._starts, self._lines = array("Q"), array("Q")
        first = self._scan()
        if self.skipped:
            logger.warning("%d examples left out, the first: %s", self.skipped, first)
        if self.repeated:
            logger.warning("%s: queries with the text of another: %d", path, self.repeated)
        if not self._starts:
            raise DataError(f"{path}: holds no examples{f'; {first}' if first else ''}")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        """The example at an index, or a list of them for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = self._starts[index]
        end = self._bytes.find(b"\n", start)
        line = self._bytes[start : end if end >= 0 else None]
        return parse_example(parse_line(line), self.path.parent)

    def __reduce__(self) -> Any:
        return Examples, (self.path, self.corpus, self.on_error)  # another process maps the file itself

    def place(self, index: int) -> str:
        """FILE:LINE of an example, for messages."""
        return f"{self.path}:{self._lines[index]}"

    def _scan(self) -> str:
        """Note where the good lines start; what is wrong with the first that is left out."""
        first, ids, queries, start = "", set(), set(), 0
        for number, line in enumerate(iter(self._bytes.readline, b""), start=1):
            if not line.isspace():
                try:
                    record = parse_line(line)
                except ValueError as error:
                    raise DataError(f"{self.path}:{number}: {error}") from error
                self._check_corpus(record, number)
                try:
                    check_example(example := parse_example(record, self.path.parent), self.corpus, ids)
                except ValueError as error:
                    if self.on_error == "stop":
                        raise DataError(f"{self.path}:{number}: {error}") from error
                    self.skipped, first = self.skipped + 1, first or f"{self.path}:{number}: {error}"
                else:
                    self._starts.append(start)
                    self._lines.append(number)
                    ids.add(example.query_id)
                    if style := example.provenance.get("style"):
                        self.query_styles.add(str(style))
                    self.repeated += hash(example.asked) in queries
                    queries.add(hash(example.asked))
            start += len(line)
        return first

    def _check_corpus(self, record: Mapping[str, Any], number: int) -> None:
        provenance = record.get("provenance")
        of = provenance.get("corpus") if isinstance(provenance, dict) else None
        if of not in (None, self.corpus.content_hash):
            raise DataError(
                f"{self.path}:{number}: made from a corpus of hash {of}, but {self.corpus.path} has "
                f"{self.corpus.content_hash}: another corpus, or changed since; mine or convert again"
            )


def check_example(example: Example, corpus: Corpus, seen_ids: set[str]) -> None:
    """Raise ValueError if its query_id is among `seen_ids`, or a passage twice there or not in the corpus."""
    if example.query_id and example.query_id in seen_ids:
        raise ValueError(f"query_id {example.query_id!r} stands there twice")
    ids = (*example.positives, *example.negatives)
    twice = [id_ for id_, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"passage {twice[0]!r} stands there twice")
    positions = corpus.positions(ids)
    if positions.min() < 0:
        raise ValueError(f"passage {ids[int(positions.argmin())]!r} is not in {corpus.path}")


def _map(path: Path) -> mmap.mmap:
    if path.suffix == ".gz":
        raise DataError(f"{path}: compressed examples cannot be mapped; gunzip them first")
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # an empty file has no map
        raise DataError(f"{path}: holds no examples") from error
