"""The records of synthesis: a call of the generator, its reply, a draft of an example."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data.errors import require, require_range
from data.records import Passage


@dataclass(frozen=True)
class Call:
    """A prompt for the generator, filled, with its sampling."""

    prompt: str
    seed: int = 0
    passage: Passage | None = None
    """The seed passage, where there is one: for generators that read no prompt."""
    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_range(self, "sampling.", ">= 0", "temperature")
        require_range(self, "sampling.", ">= 1", "max_tokens")
        require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "in (0, 1]")


@dataclass(frozen=True)
class Written:
    """The reply to a call; `refused` says why there is none, where the generator takes no such prompt."""

    text: str
    prompt_tokens: int = 0
    """Tokens of prompt and text together where that is all an endpoint tells."""
    new_tokens: int = 0
    logprob: float | None = None
    """Mean log-probability of its tokens, where the generator tells it."""
    refused: str = ""


@dataclass(frozen=True)
class Draft:
    """A query that a generator wrote, and what is known of it so far."""

    id: str
    seed: str
    """Id of the seed passage; "" where the generator wrote the passage, too."""
    fields: Mapping[str, Any]
    """Fields that were parsed: query, and where the recipe asks for them task, answer, positive, negative."""
    draws: Mapping[str, Any] = field(default_factory=dict)
    hits: tuple[tuple[str, float], ...] = ()
    """Candidates, best first: id and the retriever's score."""
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Judge -> passage -> score."""
    logprob: float | None = None
    positive: str = ""
    negatives: tuple[str, ...] = ()
    labels: Mapping[str, float] = field(default_factory=dict)
    """Scores of positive and negatives, where a judge is believed."""
    labelled_by: tuple[str, ...] = ()
    """The judges that gave them."""

    @property
    def query(self) -> str:
        """The query itself."""
        return str(self.fields["query"])


def draw_seed(*parts: object) -> int:
    """Return a random seed, the same for the same parts in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")
