"""The stages of one search: a backend finds, and rerankers of others order anew what it gave.

    [{"retrieve": "default", "k": 100}, {"rerank": "reranked", "k": 10}]

A backend that has a `Rerank` in it, however deep, lends that; who found the passages does not matter to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data.errors import DataError
from data.records import Hit
from retriever_server.retriever import Filter, Query
from retriever_server.server.hot_swap import Opened
from retriever_server.server.schema import Stage


class Staged:
    """Stages in the order they are gone through. `with staged:` keeps what they use open."""

    def __init__(
        self, stages: Sequence[Stage], find: Callable[[str], Opened], top_k: int, max_k: int
    ) -> None:
        """find: what answers now for a backend's name. Raises DataError for stages that cannot be."""
        _check_kinds(stages)
        self._stages = stages
        self._opened = [find(stage.retrieve or stage.rerank or "") for stage in stages]
        self._rerankers = [
            _reranker(opened, f"stages.{i}", stage.rerank or "")
            for i, (stage, opened) in enumerate(zip(stages, self._opened, strict=True))
            if i
        ]
        self.k = _hits_of_each(stages, [reranker.depth for reranker in self._rerankers], top_k, max_k)

    def takes_images(self) -> bool:
        """Whether a query may hold an image: of who finds it, since rerankers read texts."""
        return not self._rerankers and self._opened[0].retriever.takes_images()

    def corpora(self) -> list[Any]:
        """The corpora here that the first stage searches."""
        return self._opened[0].find_all("corpus")

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for searches that may travel together."""
        return (*self._opened, *self.k)

    def search(self, queries: Sequence[Query], where: Filter | None) -> list[list[Hit]]:
        """The hits that the last stage gives; for worker threads."""
        with self:
            rankings = self._opened[0].search(queries, self.k[0], where)
            for reranker, depth, k in zip(self._rerankers, self.k, self.k[1:], strict=False):
                rankings = reranker.reorder(queries, rankings, k, depth)
            return rankings

    def generations(self) -> list[str]:
        """Of what each stage gives, as its hits name them."""
        names = [self._opened[0].generation]
        for reranker, depth in zip(self._rerankers, self.k, strict=False):
            names.append(reranker.name_of(names[-1], depth))
        return names

    def report(self) -> list[Mapping[str, Any]]:
        """What each stage was, as JSON."""
        rows = zip(self._stages, self.k, self.generations(), strict=True)
        return [
            {**stage.model_dump(exclude_none=True), "k": k, "generation": generation}
            for stage, k, generation in rows
        ]

    def __enter__(self) -> Staged:
        for opened in self._opened:
            opened.__enter__()
        return self

    def __exit__(self, *of: object) -> None:
        for opened in self._opened:
            opened.__exit__(*of)


def _check_kinds(stages: Sequence[Stage]) -> None:
    for i, stage in enumerate(stages):
        right, wrong = ("rerank", "retrieve") if i else ("retrieve", "rerank")
        if getattr(stage, right) is None or getattr(stage, wrong) is not None:
            raise DataError(f"stages.{i}: must name a backend by `{right}`, and by nothing else")


def _reranker(opened: Opened, place: str, name: str) -> Any:
    if (found := opened.find("reranker")) is None:
        raise DataError(f"{place}.rerank: backend {name!r} has no reranker")
    return found


def _hits_of_each(stages: Sequence[Stage], depths: Sequence[int], top_k: int, max_k: int) -> list[int]:
    """Hits each stage gives: as it says, else what the reranker after it looks at; the last top_k."""
    given, after = [], top_k
    for stage, depth in zip(reversed(stages), [0, *reversed(depths)], strict=True):
        after = min(max(after, depth), max_k) if stage.k is None else stage.k
        given.insert(0, after)
    for i, k in enumerate(given):
        most = given[i - 1] if i else max_k
        if not 1 <= k <= most:
            raise DataError(f"stages.{i}.k = {k}: must be from 1 to {most}")
    return given
