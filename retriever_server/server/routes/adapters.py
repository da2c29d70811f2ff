"""The same retriever to clients of other servers: TEI, OpenAI's embeddings, and MCP.

Vectors are those of the encoder inside the default retriever, scores those of its reranker; where it
has none, the routes answer 404 and say so. Texts of different requests are encoded together. Where the
encoder reads images, {"image": base64, "text": "..."} may stand for a text.
"""

from __future__ import annotations

import base64
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from data.errors import ConfigError, DataError
from data.records import Passage
from retriever_server.server import schema
from retriever_server.server.batching import Overloaded
from retriever_server.server.hot_swap import Opened
from retriever_server.server.image_requests import text_of
from retriever_server.server.schema import (
    Body,
    EmbedBody,
    EmbeddingsBody,
    Pictured,
    RerankBody,
    documented,
    read,
    reply,
    troubles,
)
from retriever_server.server.service import QueryFailed, Service, check_unicode, without_paths

_MOST_TEXTS = 4096
"""To encode in one request."""


def add_adapters(app: FastAPI, service: Service) -> None:
    """Add `/embed`, `/embed_sparse`, `/embed_all`, `/rerank` and `/v1/embeddings`."""
    most = service.limits.max_body_bytes

    async def embed(request: Request, kind: str) -> Any:
        body = await read(request, EmbedBody, most)
        inputs = body.inputs if isinstance(body.inputs, list) else [body.inputs]
        role = "query" if body.prompt_name == "query" else "passage"
        rows = await _encode(service, request, inputs, role, kind, whole=body.truncate is False)
        return [_shorten(row, body.dimensions, body.normalize) for row in rows] if kind == "dense" else rows

    def post(path: str, model: type[Body], answers: Any) -> Callable[..., Any]:
        responses = {200: {"model": answers}, **troubles(own=path.startswith("/v1/"), absent=True)}
        return app.post(path, responses=responses, openapi_extra=documented(model))

    @post("/embed", EmbedBody, list[list[float]])
    async def embed_dense(request: Request) -> Response:
        """One vector a text, as TEI."""
        return reply([row.tolist() for row in await embed(request, "dense")])

    @post("/embed_sparse", EmbedBody, list[list[schema.Weight]])
    async def embed_sparse(request: Request) -> Response:
        """The weights above zero of each text, as TEI."""
        rows = await embed(request, "sparse")
        return reply([[{"index": i, "value": v} for i, v in _nonzero(row)] for row in rows])

    @post("/embed_all", EmbedBody, list[list[list[float]]])
    async def embed_all(request: Request) -> Response:
        """One vector a token of each text, as TEI."""
        return reply([row.tolist() for row in await embed(request, "multi")])

    @post("/v1/embeddings", EmbeddingsBody, dict[str, Any])
    async def embeddings(request: Request) -> Response:
        """One vector a text, as OpenAI."""
        body = await read(request, EmbeddingsBody, most)
        inputs = body.input if isinstance(body.input, list) else [body.input]
        rows = await _encode(service, request, inputs, "query" if body.is_query else "passage", "dense")
        vectors = [_shorten(row, body.dimensions, body.dimensions is not None) for row in rows]
        coded = [_base64(v) if body.encoding_format == "base64" else v.tolist() for v in vectors]
        data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(coded)]
        usage = {"prompt_tokens": 0, "total_tokens": 0}  # counted by nobody here
        return reply({"object": "list", "data": data, "model": body.model or "sleuth", "usage": usage})

    @post("/rerank", RerankBody, list[schema.Scored] | dict[str, Any])
    async def rerank(request: Request) -> Response:
        """Texts by how well they answer the query: as TEI, or for `queries` as Search-R1's reranker."""
        body = await read(request, RerankBody, most)
        if body.queries is not None:
            return reply(await _rerank_documents(service, request, body, body.queries))
        if body.query is None:
            raise DataError("query: must be a string")
        pairs = [(body.query, text) for text in body.texts]
        scores = await _score(service, request, pairs, whole=body.truncate is False)
        found = [
            {
                "index": i,
                "score": score if body.raw_scores else _sigmoid(score),
                **({"text": body.texts[i]} if body.return_text else {}),
            }
            for i, score in enumerate(scores)
        ]
        return reply(sorted(found, key=lambda item: -item["score"]))


async def _encode(
    service: Service,
    request: Request,
    inputs: Sequence[str | Pictured],
    role: Any,
    kind: str,
    whole: bool = False,
) -> list[Any]:
    """A row an input: (D,) dense, a csr row sparse, (tokens, D) multi. whole: refuse what would be cut."""
    with service.default.current as opened:
        encoder = _inside(opened, "encoder")
        if encoder.spec.kind != kind:
            raise HTTPException(404, f"the encoder is {encoder.spec.kind}, not {kind}")
        _check_texts([text_of(each) for each in inputs])
        if whole:
            texts = [(_text_alone(each), role) for each in inputs]
            await _refuse_what_is_cut(service, request, opened, encoder.tokens_of, texts)
        rows = await service.wait(service.encode(opened, inputs, role), request)
    return _checked(rows, "encoding")


async def _score(
    service: Service, request: Request, pairs: list[tuple[str, str]], whole: bool = False
) -> list[float]:
    """How well each text answers the query beside it. whole: refuse what would be cut."""
    if len(pairs) > service.limits.max_hits:
        raise DataError(f"{len(pairs)} pairs, at most {service.limits.max_hits} are allowed")
    with service.default.current as opened:
        scorer = _inside(opened, "scorer")
        check_unicode([text for pair in pairs for text in pair])
        if whole:
            count = functools.partial(_tokens_of_pair, scorer)
            await _refuse_what_is_cut(service, request, opened, count, pairs)

        def work(items: list[tuple[str, str]]) -> list[float]:
            with opened:
                return [float(x) for x in scorer.score([(query, Passage("", text)) for query, text in items])]

        scores = await service.wait(service.batcher.run((opened, "score"), work, pairs), request)
    return _checked(scores, "scoring")


async def _refuse_what_is_cut(
    service: Service, request: Request, opened: Opened, tokens_of: Callable[..., Any], items: list[Any]
) -> None:
    """Raise 413, as TEI, for a text or pair of which not all tokens would be read."""

    def work(items: list[Any]) -> list[Any]:
        with opened:
            return [tokens_of(*item) or (0, -1) for item in items]

    counting = service.batcher.run((opened, "tokens", object()), work, items)
    for tokens, kept in _checked(await service.wait(counting, request), "counting tokens"):
        if kept < 0:
            raise DataError("truncate: false cannot be promised: the model does not say what it cuts")
        if tokens > kept:
            raise HTTPException(413, f"inputs: one of {tokens} tokens or more, at most {kept} are read")


def _text_alone(asked: str | Pictured) -> str:
    if isinstance(asked, Pictured) and asked.image is not None:
        raise DataError("truncate: false cannot be promised for an image with its text")
    return text_of(asked)


def _tokens_of_pair(scorer: Any, query: str, text: str) -> Any:
    return scorer.tokens_of(query, Passage("", text)) if hasattr(scorer, "tokens_of") else None


def _checked(rows: list[Any], what: str) -> list[Any]:
    """Rows or scores; raises the first error among them, and refuses what holds NaN."""
    failed = next((row for row in rows if isinstance(row, Exception)), None)
    if failed is not None:
        raise HTTPException(503, f"{what} failed: {without_paths(f'{type(failed).__name__}: {failed}')}")
    if not all(np.isfinite(getattr(row, "data", row)).all() for row in rows):
        raise HTTPException(503, f"{what} failed: NaN or infinite")
    return rows


async def _rerank_documents(
    service: Service, request: Request, body: RerankBody, queries: list[str]
) -> dict[str, Any]:
    if len(queries) != len(body.documents):
        raise DataError(f"documents: {len(body.documents)} lists for {len(queries)} queries")
    pairs = [
        (query, str(_document(item).get("contents", "")))
        for query, items in zip(queries, body.documents, strict=True)
        for item in items
    ]
    scores = iter(await _score(service, request, pairs, whole=body.truncate is False))
    rows = []
    for items in body.documents:
        scored = [{"document": _document(item), "score": next(scores)} for item in items]
        best = sorted(scored, key=lambda hit: -hit["score"])[: body.rerank_topk]
        rows.append(best if body.return_scores else [hit["document"] for hit in best])
    return {"result": rows}


def _document(item: dict[str, Any]) -> dict[str, Any]:
    inner = item.get("document")
    return inner if isinstance(inner, dict) else item


def _inside(opened: Opened, attribute: str) -> Any:
    if (found := opened.find(attribute)) is None:
        raise HTTPException(404, f"the retriever has no {attribute}")
    return found


def _check_texts(texts: list[str]) -> None:
    if len(texts) > _MOST_TEXTS:
        raise DataError(f"{len(texts)} texts, at most {_MOST_TEXTS} are allowed")
    check_unicode(texts)


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


def make_mcp(service: Service) -> Any:
    """An MCP server with the tools `search` and `fetch`."""
    from mcp.server import MCPServer
    from mcp.server.mcpserver.exceptions import ToolError

    server = MCPServer("sleuth", instructions="Search a collection of passages, then fetch one by its id.")

    @server.tool()
    async def search(query: str, top_k: int | None = None) -> dict[str, Any]:
        """Passages that answer a query, best first: id, title, url and text of each."""
        try:
            [hits] = (await service.search([query], top_k)).rankings()
        except (DataError, ConfigError, QueryFailed, Overloaded, TimeoutError) as error:
            raise ToolError(str(error)) from error
        return {"results": [{**_page(hit.passage), "score": hit.score} for hit in hits]}

    @server.tool()
    async def fetch(id: str) -> dict[str, Any]:
        """The page of the collection with this id or url."""
        [page] = await service.fetch([id])
        if page is None:
            raise ToolError(f"no page {id!r} in this collection")
        return {**_page(page), "metadata": dict(page.metadata)}

    return server


def add_mcp(app: FastAPI, server: Any, guarded: bool) -> None:
    """Mount an MCP server at `/mcp` (streamable HTTP, stateless: any worker answers).

    Not `guarded` by a token, it answers only who calls it by a loopback name, so that no web page can.
    """
    from mcp.server.transport_security import TransportSecuritySettings

    security = TransportSecuritySettings(enable_dns_rebinding_protection=False) if guarded else None
    mounted = server.streamable_http_app(json_response=True, stateless_http=True, transport_security=security)
    app.router.routes.extend(mounted.routes)


def _page(passage: Passage) -> dict[str, Any]:
    url = str(passage.metadata.get("url") or "")
    return {"id": passage.id, "title": passage.title, "text": passage.text, "url": url}
