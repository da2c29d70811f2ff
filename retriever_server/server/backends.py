"""Backends: retrievers that answer, are replaced while requests are in flight, and are searched in stages.

A request keeps the retrievers it began with; an old one is closed when the last of its requests is done.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data.atomic import stamp_of
from data.errors import ConfigError, DataError, SleuthError
from data.records import Hit
from retriever_server.retriever import Filter, Query, Retriever, corpora_in, inside
from retriever_server.server.schema import Stage

if TYPE_CHECKING:
    from data.corpus import Corpus
    from retriever_server.retrievers.rerank import Rerank

_log = logging.getLogger(__name__)

_WARM_UP_QUERY = "a"


class RetrieverLease:
    """A retriever in use: `with lease:` keeps it open although another has taken its place."""

    def __init__(self, retriever: Retriever) -> None:
        self.retriever, self.generation = retriever, retriever.generation
        self._users, self._retired, self._lock = 0, False, threading.Lock()

    def __enter__(self) -> RetrieverLease:
        with self._lock:
            self._users += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._leave(1, False)

    def search(self, queries: Sequence[Query], k: int, where: Filter | None) -> list[list[Hit]]:
        """Search as the retriever does; for worker threads."""
        with self:
            rankings = self.retriever.search(queries, k, where)
            if self.retriever.waits:  # another machine's generation may have changed meanwhile
                self.generation = self.retriever.generation
            return rankings

    def retire(self) -> None:
        """Close it as soon as nobody uses it."""
        self._leave(0, True)

    def _leave(self, users: int, retire: bool) -> None:
        with self._lock:
            was_over = self._retired and not self._users
            self._users -= users
            self._retired |= retire
            over = self._retired and not self._users and not was_over
        if over:
            self.retriever.close()


class HotSwappable:
    """A retriever that can be replaced under load by what lies at its place now.

    reopen opens that; stamp changes whenever it may be another. Without them it stays what it is.
    """

    def __init__(
        self,
        retriever: Retriever,
        reopen: Callable[[], Retriever] | None = None,
        stamp: Callable[[], object] | None = None,
    ) -> None:
        self.current = RetrieverLease(retriever)
        self._reopen, self._stamp = reopen, stamp
        self._seen = stamp() if stamp else None
        self._one_at_a_time = threading.Lock()
        self.on_swap: Callable[[], object] = lambda: None
        """Called, in some thread, after another generation has taken over."""

    @property
    def generation(self) -> str:
        """The generation of the retriever that answers new requests."""
        return self.current.generation

    def reload(self) -> bool:
        """Open what lies there now and let it answer; return whether it was another generation.

        Takes as long as opening and one search. Raises what they raise; the old one then goes on.
        """
        if self._reopen is None:
            raise ConfigError("this retriever has no place on disk to be opened from again")
        with self._one_at_a_time:
            self._seen = self._stamp() if self._stamp else None
            return self._swap(self._reopen())

    def change(self, make: Callable[[Retriever], Retriever]) -> bool:
        """Let what `make` gives for the retriever answer, as `reload`."""
        with self._one_at_a_time:
            return self._swap(make(self.current.retriever))

    def _swap(self, retriever: Retriever) -> bool:
        before, found = self.generation, RetrieverLease(retriever)
        if retriever is self.current.retriever:
            return False
        if found.generation == before:
            found.retire()
            return False
        found.search([_WARM_UP_QUERY], 1, None)  # what cannot search takes nobody's place
        old, self.current = self.current, found
        old.retire()
        self.on_swap()
        _log.info("swapped %s for %s", before, found.generation)
        return True

    async def watch(self, every_seconds: float) -> None:
        """Reload whenever the stamp changes, for ever; what does not open is logged and left."""
        while self._stamp is not None:
            await asyncio.sleep(every_seconds)
            try:
                # Twice the same: not in the middle of being replaced.
                found = self._stamp()
                if found and found != self._seen and found == self._stamp():
                    await asyncio.to_thread(self.reload)
            except (SleuthError, OSError, ValueError) as error:
                _log.error("%s stays: %s", self.generation, error)
            except Exception:
                _log.exception("%s stays", self.generation)


def backend_of(backends: Mapping[str, HotSwappable], name: str | None) -> HotSwappable:
    """Return the backend of this name, the default for None; DataError where there is none."""
    name = next(iter(backends)) if name is None else name
    if name not in backends:
        raise DataError(f"backend {name!r}: must be one of {', '.join(backends)}")
    return backends[name]


def stamp(spec: str) -> tuple:
    """Return another value once the index folder or YAML file `spec` was replaced; () where it is missing."""
    path = Path(spec)
    try:
        if path.suffix in (".yaml", ".yml"):
            text = path.read_text(encoding="utf-8")
            named = re.findall(r"[^\s,\[\]{}\"']+", text)
            return (text, *(stamp(name) for name in named if "/" in name or name.endswith("ml")))
        return stamp_of(path / "manifest.json")
    except (OSError, ValueError):
        return ()


class SearchPipeline:
    """The stages of one search: a backend finds passages, and rerankers of others order them anew.

        [{"retrieve": "default", "k": 100}, {"rerank": "reranked", "k": 10}]

    A backend that has a `Rerank` in it, however deep, lends that, whoever found the passages.
    `with pipeline:` keeps open what it uses.
    """

    def __init__(
        self, stages: Sequence[Stage], backends: Mapping[str, HotSwappable], top_k: int, max_k: int
    ) -> None:
        """Raises DataError for stages that cannot be."""
        self._stages, self._leases, self._rerankers = stages, list[RetrieverLease](), list["Rerank"]()
        for i, stage in enumerate(stages):
            right, wrong = (stage.rerank, stage.retrieve) if i else (stage.retrieve, stage.rerank)
            if right is None or wrong is not None:
                kind = "rerank" if i else "retrieve"
                raise DataError(f"stages.{i}: must name a backend by `{kind}`, and by nothing else")
            self._leases.append(backend_of(backends, right).current)
            if i:
                if (reranker := _reranker_in(self._leases[-1].retriever)) is None:
                    raise DataError(f"stages.{i}.rerank: backend {right!r} has no reranker")
                self._rerankers.append(reranker)
        self.k = _hits_of_each(stages, [reranker.depth for reranker in self._rerankers], top_k, max_k)
        """Hits that each stage gives."""
        self.key = (*self._leases, *self.k)
        """Equal for searches that may travel together."""

    def takes_images(self) -> bool:
        """Return whether a query may hold an image: what finds passages must take it; rerankers read text."""
        return not self._rerankers and self._leases[0].retriever.takes_images()

    def corpora(self) -> list[Corpus]:
        """Return the corpora here that the first stage searches."""
        return corpora_in(self._leases[0].retriever)

    def search(self, queries: Sequence[Query], where: Filter | None) -> list[list[Hit]]:
        """Return the hits of the last stage; for worker threads."""
        with self:
            rankings = self._leases[0].search(queries, self.k[0], where)
            for reranker, depth, k in zip(self._rerankers, self.k, self.k[1:], strict=False):
                rankings = reranker.reorder(queries, rankings, k, depth)
            return rankings

    def __enter__(self) -> SearchPipeline:
        for lease in self._leases:
            lease.__enter__()
        return self

    def __exit__(self, *of: object) -> None:
        self.generations = [self._leases[0].generation]
        for reranker, depth in zip(self._rerankers, self.k, strict=False):
            self.generations.append(reranker.name_of(self.generations[-1], depth))
        for lease in self._leases:
            lease.__exit__(*of)


def _reranker_in(retriever: Retriever) -> Rerank | None:
    from retriever_server.retrievers.rerank import Rerank

    return next((part for part in inside(retriever) if isinstance(part, Rerank)), None)


def _hits_of_each(stages: Sequence[Stage], depths: Sequence[int], top_k: int, max_k: int) -> list[int]:
    """Hits of each stage: as it says, else what the reranker after it looks at; of the last, top_k."""
    given, after = [], top_k
    for stage, depth in zip(reversed(stages), [0, *reversed(depths)], strict=True):
        after = min(max(after, depth), max_k) if stage.k is None else stage.k
        given.insert(0, after)
    for i, k in enumerate(given):
        most = given[i - 1] if i else max_k
        if not 1 <= k <= most:
            raise DataError(f"stages.{i}.k = {k}: must be from 1 to {most}")
    return given
