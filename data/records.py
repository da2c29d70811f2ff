"""The records that flow between the floors. All frozen, all plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FORMAT_VERSION = 1
"""Written into everything that goes to disk."""


@dataclass(frozen=True)
class Passage:
    """One retrievable unit: text, an image, or both. `id` is unique in its corpus.

    metadata: free JSON values, for filters. image: a file, or a page of one ("report.pdf#page=3", from 1).
    media: files of other modalities, by their names (`data.modalities`), such as {"audio": "7.wav"}.
    """

    id: str
    text: str
    title: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    image: str = ""
    media: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def files(self) -> dict[str, str]:
        """What it holds beside text, by modality: its image and its media."""
        return {**({"image": self.image} if self.image else {}), **self.media}

    @property
    def contents(self) -> str:
        """Search-R1's single field: the quoted title, a newline, the text."""
        return f'"{self.title}"\n{self.text}' if self.title else self.text


@dataclass(frozen=True)
class Item:
    """What is encoded, asked or judged where it is not a text alone: an image, or an image and its text.

    image: a file, a page of one ("report.pdf#page=3"), or the bytes of a file; `data.modalities` reads it.
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
    `cluster` (the unit that the bootstrap resamples, such as an entity) and `query_image` (a file that is
    asked with or instead of the text).
    """

    id: str
    text: str
    gold_answers: tuple[str, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def asked(self) -> Input:
        """What is searched: its text, its image, or both."""
        image = self.metadata.get("query_image")
        return Item(str(image), self.text) if image else self.text


@dataclass(frozen=True)
class Hit:
    """A passage found, its score, and the index generation that found it."""

    passage: Passage
    score: float
    generation: str
