"""The one interface of everything that finds passages, in process or behind HTTP, and that of scorers."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data.errors import DataError, RetrieverError, RetrieverRefused
from data.records import Hit, Input, Item, Passage

if TYPE_CHECKING:
    from data.corpus import Corpus
    from retriever_server.encoders.spec import Encoder

Query = Input
"""A query: a text, an image, or both."""

Filter = Mapping[str, Any]
"""A filter on the metadata of passages, as JSON; several fields must all agree (see `filters`).

    {"year": 1999, "lang": {"in": ["de", "fr"]}, "pages": {"gte": 10, "lt": 20}}
"""

Scores = list[dict[str, float]]
"""Scores of passages by id, a mapping a query."""

Outcome = list[Hit] | RetrieverError
"""The hits of one query, or the error that it alone met."""


def texts_of(queries: Sequence[Query], what: str) -> list[str]:
    """Return the queries of a retriever of text; DataError naming it if one holds an image (audio, ...)."""
    if held := {query.modality for query in queries if isinstance(query, Item)}:
        given = min(held).replace("image", "an image")
        raise DataError(f"{what}: reads text only, a query with {given} was given")
    return list(map(str, queries))


class Scorer(ABC):
    """Judges how well a passage answers a query."""

    name: str
    """The model and its settings: part of the generation."""

    @abstractmethod
    def score(self, pairs: list[tuple[str, Passage]]) -> list[float]:
        """Return a number a pair, higher is better, comparable for one query. Need not be thread-safe."""

    def score_each(self, queries: Sequence[str], passages: Sequence[Sequence[Passage]]) -> Scores:
        """Score the passages of each query. Raises DataError where `score` gives not a number a pair."""
        pairs = [(query, passage) for query, each in zip(queries, passages, strict=True) for passage in each]
        given = self.score(pairs) if pairs else []
        if len(given) != len(pairs):
            raise DataError(f"{self.name}: gave {len(given)} numbers for {len(pairs)} pairs")
        values = iter(given)
        return [{passage.id: float(next(values)) for passage in each} for each in passages]

    def tokens_of(self, query: str, passage: Passage) -> tuple[int, int] | None:
        """Count the tokens of a pair, and those that are read, as `Encoder.tokens_of`."""
        return None


class Retriever(ABC):
    """Queries in, ranked passages out."""

    generation: str
    """Names what answers: the index on disk, its settings and its corpus. Stamped on every hit."""
    waits: bool = False
    """Set where a search waits for another machine, so that it must not hold up an event loop."""
    parts: Sequence[Retriever] = ()
    """The retrievers that it asks in turn (see `Wrapper`)."""
    encoder: Encoder | None = None
    """Makes the vectors of queries, if vectors are what it searches."""
    corpus: Corpus | None = None
    """The passages, if they lie here."""
    scorer: Scorer | None = None
    """Scores a passage for a query, if that is how it ranks."""
    window_seconds: float = 0.0
    """Time that a client waits for other queries to travel in the same request."""

    @abstractmethod
    def search(self, queries: Sequence[Query], k: int, where: Filter | None = None) -> list[list[Hit]]:
        """Return the best `k` passages of each query among those that `where` allows, best first.

        queries (Q,) -> Q lists of at most k hits, fewer only where fewer match. One return type,
        always. Thread-safe. Raises DataError for a filter that is none.
        """

    def score(self, queries: Sequence[Query], passages: Sequence[Sequence[Passage]]) -> Scores:
        """Score these passages for each query, by id, as a search would if it found them.

        A passage that is not in the index has no score; a retriever that only ranks gives none.
        """
        return [{} for _ in queries]

    def add(self, passages: Sequence[Passage], replaces: bool = False) -> Retriever:
        """Add passages on disk; return what searches the new generation, while this one goes on.

        replaces: a passage takes the place of the one with its id. Raises DataError for an id that is there
        already, RetrieverRefused where passages cannot be added.
        """
        raise RetrieverRefused(f"{type(self).__name__}: passages are added to an index, and this is none")

    def delete(self, ids: Sequence[str]) -> Retriever:
        """Delete passages on disk, as `add`; DataError names an id that is unknown."""
        raise RetrieverRefused(f"{type(self).__name__}: passages are deleted from an index, and this is none")

    def compact(self) -> Retriever:
        """Merge what changes have left on disk, where there is much, as `add`; else return this one."""
        return self

    def takes_images(self) -> bool:
        """Return whether a query may be an image, or hold one. May ask another machine."""
        return self.encoder is not None and "image" in self.encoder.takes

    def query_style(self) -> str | None:
        """Return the text that it was trained to be asked in; None where any will do. May ask a machine."""
        if self.encoder is not None:
            return self.encoder.spec.query_style
        return next(filter(None, (part.query_style() for part in self.parts)), None)

    def accepts(self, query: Query) -> bool:
        """Return whether it can search this: every text, and images where it takes them."""
        return not isinstance(query, Item) or self.takes_images()

    def thumbnail(self, passage_id: str, side: int) -> bytes | None:
        """Return the image of a passage as a server that it asks shows it; None where none does."""
        shown = (part.thumbnail(passage_id, side) for part in self.parts)
        return next((image for image in shown if image is not None), None)

    def probe(self) -> None:
        """Raise a RetrieverError, soon, where a server that it asks does not answer."""
        for part in self.parts:
            part.probe()

    def describe(self) -> dict[str, Any]:
        """Describe it as JSON, for `/v1/info`."""
        return {"kind": type(self).__name__, "generation": self.generation}

    def close(self) -> None:
        """Close files and connections."""
        for part in self.parts:
            part.close()

    async def ask(self, queries: list[Query], k: int) -> Sequence[Outcome]:
        """Search from an event loop: the hits of each query, or its error.

        In the loop's own thread, so that the order of answers depends on that of the questions alone;
        one that waits for other machines is searched in a thread, so that the loop goes on meanwhile.
        """
        if self.waits:
            return await asyncio.to_thread(self.search, queries, k)
        return self.search(queries, k)

    async def picture(self, passage: Passage, side: int) -> bytes:
        """Return a JPEG or PNG file of the passage's image, at most `side` pixels wide and high."""
        elsewhere = passage.image.startswith(("http://", "https://"))
        if elsewhere and (made := await asyncio.to_thread(self.thumbnail, passage.id, side)):
            return made
        from data.pages.images import read_image, thumbnail

        return thumbnail(read_image(passage.image), side)

    async def document(self, passage_id: str) -> Passage | None:
        """Return the document that a passage is from, as one passage; None where there is no such passage.

        Its passages are those beside it with its url, else its title. Raises RetrieverRefused where there is
        neither a corpus here nor a Sleuth server over one.
        """
        if self.corpus is not None and (found := self.corpus.document(passage_id)):
            return found
        refusals = [RetrieverRefused(f"{type(self).__name__}: no corpus to read documents from")]
        for part in self.parts:
            try:
                if found := await part.document(passage_id):
                    return found
            except RetrieverRefused as error:
                refusals.append(error)
        if self.corpus is None and len(refusals) > len(self.parts):
            raise refusals[-1]
        return None

    async def leave(self) -> None:  # noqa: B027 (most hold nothing open)
        """Close the connections of the running event loop."""


class Wrapper(Retriever):
    """A retriever over others: what it does not do itself, the first of them does that can."""

    def __init__(self, *parts: Retriever) -> None:
        self.parts = parts
        self.waits = any(part.waits for part in parts)
        self.encoder = next((part.encoder for part in parts if part.encoder), None)
        self.corpus = next((part.corpus for part in parts if part.corpus is not None), None)
        self.scorer = next((part.scorer for part in parts if part.scorer), None)

    def takes_images(self) -> bool:
        return all(part.takes_images() for part in self.parts)


def corpora_in(retriever: Retriever) -> list[Corpus]:
    """Return the different corpora of a retriever and all that it is made of, the outer before the inner."""
    found = [part.corpus for part in inside(retriever) if part.corpus is not None]
    return list({id(corpus): corpus for corpus in found}.values())


def inside(retriever: Retriever) -> Iterator[Retriever]:
    """Yield a retriever and all that it is made of, the outer before the inner."""
    yield retriever
    for part in retriever.parts:
        yield from inside(part)
