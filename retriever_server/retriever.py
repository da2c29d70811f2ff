"""The one interface that everything which finds passages implements, in process or behind HTTP."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from data.records import Hit

Query = str
"""What is searched. Text today; images join it as another modality of the same argument."""

Filter = Mapping[str, Any]
"""Which passages may be hits, by their metadata, as JSON; several fields must all agree (see `filters`).

    {"year": 1999, "lang": {"in": ["de", "fr"]}, "pages": {"gte": 10, "lt": 20}}
"""


class Retriever(ABC):
    """Queries in, ranked passages out."""

    generation: str
    """Names what answers: the index on disk, its settings and its corpus. Stamped on every hit."""

    waits: bool = False
    """Whether a search waits for another machine, so that it must not hold up an event loop."""

    @abstractmethod
    def search(self, queries: list[Query], k: int, where: Filter | None = None) -> list[list[Hit]]:
        """The best `k` passages of each query among those that `where` allows, best first.

        queries (Q,) -> Q lists of at most k hits, fewer only where fewer match. One return type,
        always. Thread-safe. Raises DataError for a filter that is none.
        """

    def describe(self) -> dict[str, Any]:
        """What `/v1/info` tells of it, as JSON."""
        return {"kind": type(self).__name__, "generation": self.generation}

    def close(self) -> None:  # noqa: B027 (most hold nothing open)
        """Let go of what is open."""
