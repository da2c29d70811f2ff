"""The one interface that everything which finds passages implements, in process or behind HTTP."""

from __future__ import annotations

from abc import ABC, abstractmethod

from data.records import Hit

Query = str
"""What is searched. Text today; images join it as another modality of the same argument."""


class Retriever(ABC):
    """Queries in, ranked passages out."""

    generation: str
    """Names what answers: the index on disk, its settings and its corpus. Stamped on every hit."""

    @abstractmethod
    def search(self, queries: list[Query], k: int) -> list[list[Hit]]:
        """The best `k` passages of each query, best first; fewer only where fewer match.

        queries (Q,) -> Q lists of at most k hits. One return type, always. Thread-safe.
        """
