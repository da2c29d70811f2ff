"""The models inside the default retriever, as servers of TEI and of OpenAI's embeddings offer them.

Vectors are those of its encoder, scores those of its reranker; where it has none, the routes answer 404.
Texts of different requests are encoded together. Where the encoder reads images, {"image": base64,
"text": "..."} may stand for a text.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from fastapi import APIRouter, Response
from starlette.exceptions import HTTPException

from data.errors import DataError
from data.records import Input, Passage
from retriever_server.server import schema
from retriever_server.server.backends import RetrieverLease
from retriever_server.server.errors import ANY_SEARCH, error_replies, without_paths
from retriever_server.server.middleware import JsonRoute
from retriever_server.server.replies import JsonReply
from retriever_server.server.schema import EmbedBody, EmbeddingsBody, ImageInput, RerankBody
from retriever_server.server.service import Caller, CallerOf, check_unicode, texts_of

_Found = TypeVar("_Found")
_MOST_TEXTS = 4096
"""To encode in one request."""

router = APIRouter(route_class=JsonRoute, responses=error_replies(*ANY_SEARCH, 404))


@router.post("/embed", response_model=list[list[float]])
async def embed(body: EmbedBody, caller: CallerOf) -> Response:
    """Return one vector a text, as TEI."""
    rows = await _embed(body, caller, "dense")
    return JsonReply([_shorten(row, body.dimensions, body.normalize).tolist() for row in rows])


@router.post("/embed_sparse", response_model=list[list[schema.Weight]])
async def embed_sparse(body: EmbedBody, caller: CallerOf) -> Response:
    """Return the weights above zero of each text, as TEI."""
    rows = await _embed(body, caller, "sparse")
    return JsonReply([[{"index": i, "value": v} for i, v in _nonzero(row)] for row in rows])


@router.post("/embed_all", response_model=list[list[list[float]]])
async def embed_all(body: EmbedBody, caller: CallerOf) -> Response:
    """Return one vector a token of each text, as TEI."""
    return JsonReply([row.tolist() for row in await _embed(body, caller, "multi")])


@router.post("/v1/embeddings", response_model=dict[str, Any], responses=error_replies(429))
async def embeddings(body: EmbeddingsBody, caller: CallerOf) -> Response:
    """Return one vector a text, as OpenAI."""
    inputs = body.input if isinstance(body.input, list) else [body.input]
    rows = await _encode(caller, inputs, "query" if body.is_query else "passage", "dense")
    vectors = [_shorten(row, body.dimensions, body.dimensions is not None) for row in rows]
    coded = [_base64(v) if body.encoding_format == "base64" else v.tolist() for v in vectors]
    data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(coded)]
    usage = {"prompt_tokens": 0, "total_tokens": 0}  # counted by nobody here
    return JsonReply({"object": "list", "data": data, "model": body.model or "sleuth", "usage": usage})


@router.post("/rerank", response_model=list[schema.Scored] | dict[str, Any])
async def rerank(body: RerankBody, caller: CallerOf) -> Response:
    """Score texts for a query and return the best first: as TEI, or for `queries` as Search-R1's reranker."""
    if body.queries is not None:
        return JsonReply(await _rerank_documents(body, body.queries, caller))
    if body.query is None:
        raise DataError("query: must be a string")
    scores = await _score(caller, [(body.query, text) for text in body.texts], body.truncate is False)
    if not body.raw_scores:
        scores = list(map(_sigmoid, scores))
    found: list[dict[str, Any]] = [{"index": i, "score": score} for i, score in enumerate(scores)]
    if body.return_text:
        found = [{**each, "text": text} for each, text in zip(found, body.texts, strict=True)]
    return JsonReply(sorted(found, key=lambda each: -each["score"]))


async def _rerank_documents(body: RerankBody, queries: list[str], caller: Caller) -> dict[str, Any]:
    if len(queries) != len(body.documents):
        raise DataError(f"documents: {len(body.documents)} lists for {len(queries)} queries")
    rows = [[_inner_document(item) for item in items] for items in body.documents]
    pairs = [
        (query, str(document.get("contents", "")))
        for query, row in zip(queries, rows, strict=True)
        for document in row
    ]
    scores = iter(await _score(caller, pairs, body.truncate is False))
    scored = [[{"document": document, "score": next(scores)} for document in row] for row in rows]
    best = [sorted(row, key=lambda hit: -hit["score"])[: body.rerank_topk] for row in scored]
    return {"result": best if body.return_scores else [[hit["document"] for hit in row] for row in best]}


def _inner_document(item: dict[str, Any]) -> dict[str, Any]:
    inner = item.get("document")
    return inner if isinstance(inner, dict) else item


async def _embed(body: EmbedBody, caller: Caller, kind: str) -> list[Any]:
    inputs = body.inputs if isinstance(body.inputs, list) else [body.inputs]
    role = "query" if body.prompt_name == "query" else "passage"
    return await _encode(caller, inputs, role, kind, whole=body.truncate is False)


async def _encode(
    caller: Caller, inputs: Sequence[str | ImageInput], role: Any, kind: str, whole: bool = False
) -> list[Any]:
    """Return a row an input: (D,) dense, csr sparse, (tokens, D) multi. whole: refuse what would be cut."""
    with caller.service.backend().current as lease:
        encoder = _present(lease.retriever.encoder, "encoder")
        if encoder.spec.kind != kind:
            raise HTTPException(404, f"the encoder is {encoder.spec.kind}, not {kind}")
        if len(inputs) > _MOST_TEXTS:
            raise DataError(f"{len(inputs)} texts, at most {_MOST_TEXTS} are allowed")
        check_unicode(texts := texts_of(inputs))
        pictured = any(isinstance(each, ImageInput) and each.image is not None for each in inputs)
        if whole and pictured:
            raise DataError("truncate: false cannot be promised for an image with its text")
        if whole:
            await _refuse_what_is_cut(caller, lease, encoder.tokens_of, [(text, role) for text in texts])
        if pictured and "image" not in encoder.takes:
            raise DataError("inputs: one holds an image, and the encoder reads text only")

        async def encode() -> list[Any]:
            read = await caller.service.images.read(inputs, "inputs") if pictured else texts
            return await caller.service.batcher.run((lease, "encode", role, pictured), work, read)

        def work(items: list[Input]) -> list[Any]:
            with lease:
                vectors = encoder.encode(items, role)
            return [vectors[[i]] if kind == "sparse" else vectors[i] for i in range(len(items))]

        return _checked(await caller.wait(encode()), "encoding")


async def _score(caller: Caller, pairs: list[tuple[str, str]], whole: bool = False) -> list[float]:
    """Return how well each text answers the query beside it. whole: refuse what would be cut."""
    service = caller.service
    if len(pairs) > service.limits.max_hits:
        raise DataError(f"{len(pairs)} pairs, at most {service.limits.max_hits} are allowed")
    with service.backend().current as lease:
        scorer = _present(lease.retriever.scorer, "scorer")
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


def _present(found: _Found | None, name: str) -> _Found:
    if found is None:
        raise HTTPException(404, f"the retriever has no {name}")
    return found


def _shorten(row: np.ndarray, dimensions: int | None, normalise: bool) -> np.ndarray:
    if dimensions is not None and dimensions > len(row):
        raise DataError(f"dimensions = {dimensions}: the vectors have {len(row)}")
    row = np.asarray(row, np.float32)[:dimensions]
    length = float(np.linalg.norm(row)) if normalise else 0.0
    return row / length if length else row


def _nonzero(row: Any) -> list[tuple[int, float]]:
    return [(int(i), float(v)) for i, v in zip(row.indices, row.data, strict=True)]


def _base64(row: np.ndarray) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode()


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
