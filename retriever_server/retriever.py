"""The one interface that everything which finds passages implements, in process or behind HTTP."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data.errors import DataError
from data.records import Hit, Input, Item, Passage

Query = Input
"""What is searched: a text, an image, or both."""

Filter = Mapping[str, Any]
"""Which passages may be hits, by their metadata, as JSON; several fields must all agree (see `filters`).

    {"year": 1999, "lang": {"in": ["de", "fr"]}, "pages": {"gte": 10, "lt": 20}}
"""


def text_in(query: Query) -> str:
    """The text of a query; "" where it is an image alone."""
    return query if isinstance(query, str) else query.text


def texts_of(queries: Sequence[Query], what: str) -> list[str]:
    """The queries of what reads text alone; DataError naming it if one holds an image (audio, ...)."""
    if held := {query.modality for query in queries if isinstance(query, Item)}:
        given = min(held).replace("image", "an image")
        raise DataError(f"{what}: reads text only, a query with {given} was given")
    return list(map(str, queries))


class Retriever(ABC):
    """Queries in, ranked passages out."""

    generation: str
    """Names what answers: the index on disk, its settings and its corpus. Stamped on every hit."""

    waits: bool = False
    """Whether a search waits for another machine, so that it must not hold up an event loop."""

    @abstractmethod
    def search(self, queries: Sequence[Query], k: int, where: Filter | None = None) -> list[list[Hit]]:
        """The best `k` passages of each query among those that `where` allows, best first.

        queries (Q,) -> Q lists of at most k hits, fewer only where fewer match. One return type,
        always. Thread-safe. Raises DataError for a filter that is none.
        """

    def score(
        self, queries: Sequence[Query], passages: Sequence[Sequence[Passage]]
    ) -> list[dict[str, float]]:
        """The scores of these passages for each query, by id, as a search would give them if it found them.

        Those that it can give: a passage that is not in the index has none; what only ranks gives none.
        """
        return [{} for _ in queries]

    def takes_images(self) -> bool:
        """Whether a query may be an image, or hold one. May ask another machine."""
        return False

    def probe(self) -> None:
        """Raise a RetrieverError, soon, where a server that it asks does not answer."""
        for part in (getattr(self, "retriever", None), *getattr(self, "parts", ())):
            if isinstance(part, Retriever):
                part.probe()

    def accepts(self, query: Query) -> bool:
        """Whether it can search this: every text, and images where it takes them."""
        return not isinstance(query, Item) or self.takes_images()

    def describe(self) -> dict[str, Any]:
        """What `/v1/info` tells of it, as JSON."""
        return {"kind": type(self).__name__, "generation": self.generation}

    def close(self) -> None:  # noqa: B027 (most hold nothing open)
        """Let go of what is open."""


def inside(retriever: Any) -> Iterator[Any]:
    """A retriever and all that it is made of, the outer before the inner."""
    yield retriever
    for part in (getattr(retriever, "retriever", None), *getattr(retriever, "parts", ())):
        if part:
            yield from inside(part)
