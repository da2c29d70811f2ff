"""Encode and score with the models inside the default retriever, together with what others ask."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from starlette.exceptions import HTTPException

from data.errors import DataError
from data.records import Input, Passage
from retriever_server.encoders.spec import Encoder
from retriever_server.server.errors import without_paths
from retriever_server.server.schema import ImageInput, OneOrMore, check_unicode, texts_of

if TYPE_CHECKING:
    from retriever_server.server.backends import RetrieverLease
    from retriever_server.server.service import Caller

_Found = TypeVar("_Found")
MOST_MULTI = 4096
"""Texts of a request of which every token has a vector."""


async def encode(caller: Caller, given: OneOrMore, role: Any, kind: str, whole: bool = False) -> list[Any]:
    """Return a row an input: (D,) dense, csr sparse, (tokens, D) multi. whole: refuse what would be cut."""
    is_one = not isinstance(given, list) or isinstance((given or [""])[0], int)
    listed = cast(list[Any], [given] if is_one else given)
    with caller.service.backend().current as lease:
        encoder = present(lease.retriever.encoder, "encoder")
        if encoder.spec.kind != kind:
            raise HTTPException(404, f"the encoder is {encoder.spec.kind}, not {kind}")
        most = MOST_MULTI if kind == "multi" else caller.service.limits.max_queries
        if len(listed) > most:
            raise DataError(f"{len(listed)} texts, at most {most} are allowed")
        inputs = await asyncio.to_thread(_read_tokens, encoder, listed)
        check_unicode(texts := texts_of(inputs))
        pictured = any(isinstance(each, ImageInput) and each.image is not None for each in inputs)
        if whole and pictured:
            raise DataError("truncate: false cannot be promised for an image with its text")
        if whole:
            await _refuse_what_is_cut(caller, lease, encoder.tokens_of, [(text, role) for text in texts])
        if pictured and "image" not in encoder.takes:
            raise DataError("inputs: one holds an image, and the encoder reads text only")

        async def run() -> list[Any]:
            read = await caller.service.images.read(inputs, "inputs") if pictured else texts
            return await caller.service.batcher.run((lease, "encode", role, pictured), work, read)

        def work(items: list[Input]) -> list[Any]:
            with lease:
                vectors = encoder.encode(items, role)
            return [vectors[[i]] if kind == "sparse" else vectors[i] for i in range(len(items))]

        return _checked(await caller.wait(run()), "encoding")


def _read_tokens(encoder: Encoder, inputs: list[Any]) -> list[str | ImageInput]:
    """Return the inputs with the text of what came as token ids."""
    read: list[Any] = [encoder.text_of(each) if isinstance(each, list) else each for each in inputs]
    if None in read:
        raise DataError("token ids: the encoder does not say what they stand for; send text")
    return read


async def score(caller: Caller, pairs: list[tuple[str, str]], whole: bool = False) -> list[float]:
    """Return how well each text answers the query beside it. whole: refuse what would be cut."""
    service = caller.service
    if len(pairs) > service.limits.max_hits:
        raise DataError(f"{len(pairs)} pairs, at most {service.limits.max_hits} are allowed")
    with service.backend().current as lease:
        scorer = present(lease.retriever.scorer, "scorer")
        check_unicode([text for pair in pairs for text in pair])

        def tokens_of(query: str, text: str) -> Any:
            return scorer.tokens_of(query, Passage("", text))

        def work(items: list[tuple[str, str]]) -> list[float]:
            with lease:
                return [float(x) for x in scorer.score([(query, Passage("", text)) for query, text in items])]

        if whole:
            await _refuse_what_is_cut(caller, lease, tokens_of, pairs)
        scores = await caller.wait(service.batcher.run((lease, "score"), work, pairs))
    return _checked(scores, "scoring")


async def _refuse_what_is_cut(
    caller: Caller, lease: RetrieverLease, tokens_of: Callable[..., Any], items: list[Any]
) -> None:
    """Raise 413, as TEI, for a text or pair of which not all tokens would be read."""

    def work(items: list[Any]) -> list[Any]:
        with lease:
            return [tokens_of(*item) or (0, -1) for item in items]

    counting = caller.service.batcher.run((lease, "tokens", object()), work, items)
    for tokens, kept in _checked(await caller.wait(counting), "counting tokens"):
        if kept < 0:
            raise DataError("truncate: false cannot be promised: the model does not say what it cuts")
        if tokens > kept:
            raise HTTPException(413, f"inputs: one of {tokens} tokens or more, at most {kept} are read")


def _checked(rows: list[Any], what: str) -> list[Any]:
    """Return rows or scores; raises the first error among them, and refuses what holds NaN."""
    failed = next((row for row in rows if isinstance(row, Exception)), None)
    if failed is not None:
        raise HTTPException(503, f"{what} failed: {without_paths(f'{type(failed).__name__}: {failed}')}")
    if not all(np.isfinite(getattr(row, "data", row)).all() for row in rows):
        raise HTTPException(503, f"{what} failed: NaN or infinite")
    return rows


def present(found: _Found | None, name: str) -> _Found:
    """Return what the retriever has; 404 where it has none."""
    if found is None:
        raise HTTPException(404, f"the retriever has no {name}")
    return found
