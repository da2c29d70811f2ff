"""The records that flow between the floors. All frozen, all plain data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
"""Written into everything that goes to disk."""


@dataclass(frozen=True)
class Passage:
    """One retrievable unit: text, an image, or both. `id` is unique in its corpus.

    metadata: free JSON values, for filters. image: a file, or a page of one ("report.pdf#page=3", from 1).
    media: files of other modalities, by their names (`data.pages.modalities`), such as {"audio": "7.wav"}.
    verbatim: its `contents` as the corpus has it, where title and text do not give that back.
    """

    id: str
    text: str
    title: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    image: str = ""
    media: Mapping[str, str] = field(default_factory=dict, hash=False)
    verbatim: str = field(default="", compare=False, repr=False)

    @property
    def files(self) -> dict[str, str]:
        """Files that it holds beside text, by modality: its image and its media."""
        return {**({"image": self.image} if self.image else {}), **self.media}

    def placed(self, folder: Path) -> Passage:
        """The passage with the paths of its files from `folder` on."""
        files = {name: str(folder / file) for name, file in self.files.items()}
        return replace(self, image=files.pop("image", ""), media=files)

    @property
    def contents(self) -> str:
        """Search-R1's single field: the quoted title, a newline, the text."""
        return f'"{self.title}"\n{self.text}' if self.title else self.text

    @property
    def given_contents(self) -> str:
        """The same as the corpus has it, with its own quotes and blanks."""
        return self.verbatim or self.contents

    @property
    def lines(self) -> tuple[str, str]:
        """The first line of `given_contents` and all after it: title and text as Search-R1 shows them."""
        first, _, rest = self.given_contents.partition("\n")
        return first, rest

    def keep_verbatim(self, contents: Any) -> Passage:
        """The passage, with the `contents` that it was read from; anything but a string is none."""
        needed = isinstance(contents, str) and contents != self.contents
        return replace(self, verbatim=contents) if needed else self


def split_contents(contents: str) -> tuple[str, str]:
    """Title and text of Search-R1's single field: the first line without the quotes around it, and the rest.

    '"Rome"\nA city.' -> ("Rome", "A city.");   '""Heroes" (album)"\nBy Bowie.' -> ('"Heroes" (album)', ...);
    "A city." -> ("", "A city."): one line is text.
    """
    first, newline, rest = contents.lstrip().partition("\n")
    first = first.strip()
    if not newline:
        return "", first
    quoted = len(first) > 1 and first[0] == first[-1] == '"'
    return (first[1:-1].strip() if quoted else first), rest.strip()


@dataclass(frozen=True)
class Item:
    """An input of encoders and judges that is not a text alone: an image, or an image and its text.

    image: a file, a page of one ("report.pdf#page=3"), or the bytes of a file; `modalities` reads it.
    modality: what the file is, where it is no image.
    """

    image: str | bytes
    text: str = ""
    modality: str = "image"


Input = str | Item
"""A text, or what holds an image (or a file of another modality)."""


@dataclass(frozen=True)
class Question:
    """A question with one or more accepted answers. `id` is unique over all question sets of a run.

    metadata: free JSON values; Sleuth reads `kind` (a label such as "two_hop", for scores by kind),
    `cluster` (the unit that the bootstrap resamples, such as an entity), `query_image` (a file that is asked
    with or instead of the text) and `normalizer` (of answers, see `data.metrics.answers`).
    """

    id: str
    text: str
    gold_answers: tuple[str, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def normalizer(self) -> str:
        """The normal form in which its answers are compared."""
        return str(self.metadata.get("normalizer", "squad"))

    @property
    def asked(self) -> Input:
        """The query that is searched: its text, its image, or both."""
        image = self.metadata.get("query_image")
        return Item(str(image), self.text) if image else self.text

    def as_record(self) -> dict[str, Any]:
        """The object of its line."""
        golds, metadata = list(self.gold_answers), dict(self.metadata)
        return {"id": self.id, "question": self.text, "golden_answers": golds, "metadata": metadata}


@dataclass(frozen=True)
class Example:
    """A query, the ids of passages that answer it, and the ids of passages that do not."""

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    scores: Mapping[str, float] | None = None
    """Scores of passages, by id; higher is better, comparable for one query; `provenance.scores`: by whom."""
    query_id: str = ""
    answers: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Origin: `corpus` (content hash), `generation` (of the retriever mined with), `scores`
    (whose they are), ..."""
    query_image: str = ""
    """The image asked with or instead of a text: a file, or a page of one; where it is written down its path
    starts at the folder of the examples."""

    @property
    def is_scored_by_miner(self) -> bool:
        """Return whether the scores are those of the retriever that found the negatives, and no teacher's."""
        return bool(self.scores) and self.provenance.get("scores") == self.provenance.get("generation", "")

    @property
    def asked(self) -> Input:
        """The query: its text, its image, or both."""
        return Item(self.query_image, self.query) if self.query_image else self.query

    def as_record(self) -> dict[str, Any]:
        """The object of its line; what is empty is left out."""
        lists = {"positives": self.positives, "negatives": self.negatives, "answers": self.answers}
        record: dict[str, Any] = {"query_id": self.query_id, "query": self.query}
        record["query_image"] = self.query_image and os.path.abspath(self.query_image)
        record |= {name: list(ids) for name, ids in lists.items()}
        record |= {"scores": dict(self.scores or {}), "provenance": dict(self.provenance)}
        return {name: value for name, value in record.items() if value or name in ("query", "positives")}


@dataclass(frozen=True)
class Hit:
    """A passage found, its score, and the index generation that found it."""

    passage: Passage
    score: float
    generation: str


Qrels = dict[str, dict[str, int]]
"""Query id -> passage id -> relevance; 0 and below is judged and not relevant."""


@dataclass(frozen=True)
class Benchmark:
    """The queries of a test collection and what is known about them; its corpus is read apart."""

    queries: list[Question]
    qrels: Qrels
    excluded: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Query id -> passages that are taken out of its ranking before it is judged."""
    instruction: str = ""
    """The task for instructed encoders; BRIGHT's, by domain."""


def hash_questions(questions: Sequence[Question]) -> str:
    """First 16 hexadecimal digits of a SHA-256 over all that a question says, in their order."""
    said = [[q.id, q.text, list(q.gold_answers), dict(q.metadata)] for q in questions]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]
