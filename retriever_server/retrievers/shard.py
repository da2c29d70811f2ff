"""`Sharded`: the parts of one corpus, searched as one."""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import Any

from data.errors import (
    ConfigError,
    DataError,
    RetrieverError,
    RetrieverTimeout,
    RetrieverUnavailable,
    require,
)
from data.records import Hit, Passage
from retriever_server.retriever import Filter, Query, Retriever, Scores
from retriever_server.retrievers.side_by_side import Rankings, SideBySide, generation_of

_log = logging.getLogger(__name__)


class Sharded(SideBySide):
    """The parts of one corpus, each in an index of its own, searched as one and merged by score.

    A part that fails, or is slower than `deadline_seconds`, fails the search with an error that names it.
    With `allow_partial` the others answer instead: it is logged, counted (`partial_searches` in
    `describe()`), and the generation of every hit says `missing part N`. All parts missing is an error.
    Scores must be comparable: those of vectors are; BM25's differ a little with each part's statistics.
    """

    def __init__(
        self, parts: list[Retriever], deadline_seconds: float = 30.0, allow_partial: bool = False
    ) -> None:
        require(deadline_seconds > 0, "deadline_seconds", deadline_seconds, "> 0")
        super().__init__(parts, [])
        self.deadline_seconds, self.allow_partial, self.partial_searches = deadline_seconds, allow_partial, 0

    def search(self, queries: Sequence[Query], k: int, where: Filter | None = None) -> Rankings:
        """Return the best `k` of all parts a query; raises RetrieverTimeout or RetrieverUnavailable."""
        futures = self._ask([queries] * len(self.parts), k, where)
        wait(futures, timeout=self.deadline_seconds)
        found, names, failures = [], [], []
        for number, (part, future) in enumerate(zip(self.parts, futures, strict=True), start=1):
            if (failure := self._failure(number, part, future)) is None:
                found.append(future.result())
                names.append(generation_of(part, found[-1]))
            else:
                failures.append(failure)
                names.append(f"missing part {number}")
        if failures:
            self._report(failures, everything=not found)
        generation = self._name(names)
        return [_merge(rankings, k, generation) for rankings in zip(*found, strict=True)]

    def score(self, queries: Sequence[Query], passages: Sequence[Sequence[Passage]]) -> Scores:
        """As `Retriever.score`: each passage by the part that has it."""
        of_parts = [part.score(queries, passages) for part in self.parts]
        return [dict(ChainMap(*scores)) for scores in zip(*of_parts, strict=True)]

    def probe(self) -> None:
        """Raise where a part does not answer; with `allow_partial`, where none does."""
        failures = []
        for part in self.parts:
            try:
                part.probe()
            except RetrieverError as error:
                failures.append(error)
        if failures and (not self.allow_partial or len(failures) == len(self.parts)):
            raise failures[0]

    def _failure(self, number: int, part: Retriever, future: Future) -> RetrieverError | None:
        where = f"part {number} of {len(self.parts)} ({part.generation})"
        if not future.done():
            return RetrieverTimeout(f"{where}: no answer within {self.deadline_seconds:g} s")
        error = future.exception()
        if isinstance(error, ConfigError | DataError):  # the caller's, as every part would say
            raise error
        if error is None or isinstance(error, RetrieverError):
            return error and type(error)(f"{where}: {error}")
        return RetrieverUnavailable(f"{where}: {type(error).__name__}: {error}")

    def _report(self, failures: list[RetrieverError], everything: bool) -> None:
        if everything or not self.allow_partial:
            raise type(failures[0])("; ".join(map(str, failures)))
        self.partial_searches += 1
        for failure in failures:
            _log.warning("answering without it: %s", failure)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "partial_searches": self.partial_searches}


def _merge(rankings: Sequence[list[Hit]], k: int, generation: str) -> list[Hit]:
    """Return the best `k` by score, an id once; ties in the order of the parts."""
    best: dict[str, Hit] = {}
    for hit in sorted((hit for ranking in rankings for hit in ranking), key=lambda hit: -hit.score):
        best.setdefault(hit.passage.id or str(len(best)), hit)
    return [replace(hit, generation=generation) for hit in list(best.values())[:k]]
