"""The models inside the default retriever, as servers of TEI and of OpenAI's embeddings offer them.

Rerankers are asked as those of Cohere, Jina and vLLM, too. Vectors are those of its encoder, scores those of
its reranker; where it has none, the routes answer 404. Texts of different requests are encoded together.
Where the encoder reads images, {"image": base64, "text": "..."} may stand for a text.
"""

from __future__ import annotations

import asyncio
import base64
import importlib.metadata
import json
import math
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import numpy as np
from fastapi import APIRouter, HTTPException, Response
from starlette.responses import StreamingResponse

from data.errors import DataError
from data.records import Input, Passage
from retriever_server.encoders.spec import Encoder, Role
from retriever_server.retriever import Retriever
from retriever_server.server import reply_schema, schema
from retriever_server.server.backends import RetrieverLease
from retriever_server.server.errors import ANY_SEARCH, error_replies, without_paths
from retriever_server.server.middleware import JsonRoute, parse_body
from retriever_server.server.replies import LONG_ANSWER, JsonReply, find_model, list_models
from retriever_server.server.schema import DocumentsBody, EmbedBody, ImageInput, RerankBody
from retriever_server.server.service import Caller, CallerOf, ServiceOf

router = APIRouter(route_class=JsonRoute, responses=error_replies(*ANY_SEARCH, 404))
_Found = TypeVar("_Found")
MOST_MULTI = 4096
"""Texts of a request of which every token has a vector."""
_USAGE = {"prompt_tokens": 0, "total_tokens": 0}  # counted by nobody here


@router.post("/embed", response_model=list[list[float]])
async def embed(body: EmbedBody, caller: CallerOf) -> Response:
    """Return one vector a text, as TEI."""
    rows = await _embed(body, caller, "dense")
    return _reply(rows, lambda row: _shorten(row, body.dimensions, body.normalize).tolist())


@router.post("/embed_sparse", response_model=list[list[reply_schema.Weight]])
async def embed_sparse(body: EmbedBody, caller: CallerOf) -> Response:
    """Return the weights above zero of each text, as TEI."""
    rows = await _embed(body, caller, "sparse")

    def write(row: Any) -> list[dict[str, Any]]:
        pairs = zip(row.indices.tolist(), row.data.tolist(), strict=True)
        return [{"index": index, "value": value} for index, value in pairs]

    return _reply(rows, write)


@router.post("/embed_all", response_model=list[list[list[float]]])
async def embed_all(body: EmbedBody, caller: CallerOf) -> Response:
    """Return one vector a token of each text, as TEI."""
    return _reply(await _embed(body, caller, "multi"), lambda row: row.tolist())


@router.post("/", response_model=reply_schema.AnyVectors | reply_schema.RerankReply)
async def root(body: schema.AnyInputs, caller: CallerOf) -> Response:
    """Do what the model is for, as TEI: embed the `inputs`, or rank the `texts` for a `query`."""
    given = body.model_extra or {}
    if "inputs" not in given:
        return await rerank(parse_body(schema.AnyRerankBody, given), caller)
    with caller.service.backend().current as lease:
        kind = _present(lease.retriever.encoder, "encoder").spec.kind
    route = {"sparse": embed_sparse, "multi": embed_all}.get(kind, embed)
    return await route(parse_body(EmbedBody, given), caller)


@router.get("/info", response_model=reply_schema.ModelInfo)
async def info(service: ServiceOf) -> dict[str, Any]:
    """Describe the model, as TEI."""
    with service.backend().current as lease:
        retriever = lease.retriever
        encoder = retriever.encoder
        if retriever.scorer:
            kind: dict[str, Any] = {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}}
        else:
            kind = {"embedding": {"pooling": _present(encoder, "encoder").spec.pooling}}
        return {
            "model_id": _models_of(retriever)[-1],
            "model_type": kind,
            "max_input_length": encoder and encoder.spec.max_tokens,
            "max_client_batch_size": service.limits.max_queries,
            "auto_truncate": True,
            "version": importlib.metadata.version("sleuth-rl"),
        }


@router.get("/v1/models", response_model=reply_schema.ModelsReply)
async def models(service: ServiceOf) -> dict[str, Any]:
    """List the encoder and the reranker, as OpenAI."""
    with service.backend().current as lease:
        return list_models(_models_of(lease.retriever))


@router.get("/v1/models/{name:path}", response_model=reply_schema.ModelReply)
async def model(name: str, service: ServiceOf) -> dict[str, Any]:
    """Describe one of them, as OpenAI."""
    with service.backend().current as lease:
        return find_model(_models_of(lease.retriever), name)


def _models_of(retriever: Retriever) -> list[str]:
    encoder, scorer = retriever.encoder, retriever.scorer
    return [*([encoder.spec.model] if encoder else []), *([scorer.name] if scorer else [])]


def _reply(rows: Sequence[Any], write: Callable[[Any], Any], head: str = "", tail: str = "") -> Response:
    """Answer with what is written of each row as a JSON list between `head` and `tail`, never held whole."""
    for row in rows[:1]:
        write(row)  # an error of one is that of all, raised while there is no answer yet

    def pieces() -> Iterator[str]:
        yield head + "["
        for start in range(0, len(rows), LONG_ANSWER):
            written = (json.dumps(write(row)) for row in rows[start : start + LONG_ANSWER])
            yield (", " if start else "") + ", ".join(written)
        yield "]" + tail

    if len(rows) <= LONG_ANSWER:
        return Response("".join(pieces()), media_type="application/json")
    return StreamingResponse(pieces(), media_type="application/json")


@router.post("/v1/embeddings", response_model=reply_schema.EmbeddingsReply, responses=error_replies(429))
async def embeddings(body: schema.EmbeddingsBody, caller: CallerOf) -> Response:
    """Return one vector a text, as OpenAI."""
    rows = await _encode(caller, body.input, "query" if body.is_query else "passage", "dense")

    def write(row: tuple[int, np.ndarray]) -> dict[str, Any]:
        vector = _shorten(row[1], body.dimensions, body.dimensions is not None)
        coded: Any = vector.tolist()
        if body.encoding_format == "base64":
            coded = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        return {"object": "embedding", "index": row[0], "embedding": coded}

    about = json.dumps({"object": "list", "model": body.model or "sleuth", "usage": _USAGE})
    return _reply(list(enumerate(rows)), write, f'{about[:-1]}, "data": ', "}")


@router.post("/rerank", response_model=reply_schema.RerankReply)
async def rerank(body: schema.AnyRerankBody, caller: CallerOf) -> Response:
    """Score texts for a query, best first: as TEI, Search-R1, Cohere, Jina or vLLM, by its keys."""
    asked = body.root
    if isinstance(asked, DocumentsBody):
        return await rerank_as_cohere(asked, caller)
    return await _rerank_texts(asked, caller)


async def _rerank_texts(body: RerankBody, caller: Caller) -> Response:
    if body.queries is not None:
        return JsonReply(await _rerank_documents(body, body.queries, caller))
    if body.query is None or body.texts is None:
        wrong = "query: must be a string" if body.query is None else "texts: must be a list of strings"
        raise DataError(wrong)
    scores = await _score(caller, [(body.query, text) for text in body.texts], body.truncate is False)
    if not body.raw_scores:
        scores = list(map(_sigmoid, scores))
    found: list[dict[str, Any]] = [{"index": i, "score": score} for i, score in enumerate(scores)]
    if body.return_text:
        found = [{**each, "text": text} for each, text in zip(found, body.texts, strict=True)]
    return JsonReply(sorted(found, key=lambda each: -each["score"]))


@router.post("/v1/rerank", response_model=reply_schema.RelevanceReply, responses=error_replies(429))
@router.post("/v2/rerank", response_model=reply_schema.RelevanceReply)
async def rerank_as_cohere(body: DocumentsBody, caller: CallerOf) -> Response:
    """Score documents for a query and return the best first, as Cohere, Jina and vLLM."""
    documents = [body.documents] if isinstance(body.documents, str) else body.documents
    texts = [each if isinstance(each, str) else each.text for each in documents]
    scores = map(_sigmoid, await _score(caller, [(body.query, text) for text in texts]))
    found = [{"index": i, "relevance_score": value} for i, value in enumerate(scores)]
    best = sorted(found, key=lambda each: -each["relevance_score"])[: body.top_n or None]
    if body.return_documents:
        best = [{**each, "document": {"text": texts[int(each["index"])]}} for each in best]
    named = {"id": f"rerank-{uuid.uuid4().hex}", "model": body.model or "sleuth"}
    return JsonReply({**named, "results": best, "usage": _USAGE})


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
    role = "query" if body.prompt_name == "query" else "passage"
    return await _encode(caller, body.inputs, role, kind, whole=body.truncate is False)


def _shorten(row: np.ndarray, dimensions: int | None, normalise: bool) -> np.ndarray:
    if dimensions is not None and dimensions > len(row):
        raise DataError(f"dimensions = {dimensions}: the vectors have {len(row)}")
    row = np.asarray(row, np.float32)[:dimensions]
    length = float(np.linalg.norm(row)) if normalise else 0.0
    return row / length if length else row


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


async def _encode(caller: Caller, given: schema.OneOrMore, role: Role, kind: str, whole: bool = False) -> Any:
    """Return a row an input: (D,) dense, csr sparse, (tokens, D) multi. whole: refuse what would be cut."""
    is_one = not isinstance(given, list) or isinstance((given or [""])[0], int)
    listed = cast(list[Any], [given] if is_one else given)
    with caller.service.backend().current as lease:
        encoder = _present(lease.retriever.encoder, "encoder")
        if encoder.spec.kind != kind:
            raise HTTPException(404, f"the encoder is {encoder.spec.kind}, not {kind}")
        most = MOST_MULTI if kind == "multi" else caller.service.limits.max_queries
        if len(listed) > most:
            raise DataError(f"{len(listed)} texts, at most {most} are allowed")
        inputs = await asyncio.to_thread(_read_tokens, encoder, listed)
        schema.check_unicode(texts := schema.texts_of(inputs))
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

        return _without_nan(await caller.wait(run()), "encoding")


def _read_tokens(encoder: Encoder, inputs: list[Any]) -> list[str | ImageInput]:
    """Return the inputs with the text of what came as token ids."""
    read: list[Any] = [encoder.text_of(each) if isinstance(each, list) else each for each in inputs]
    if None in read:
        raise DataError("token ids: the encoder does not say what they stand for; send text")
    return read


async def _score(caller: Caller, pairs: list[tuple[str, str]], whole: bool = False) -> list[float]:
    """Return how well each text answers the query beside it. whole: refuse what would be cut."""
    service = caller.service
    if len(pairs) > service.limits.max_hits:
        raise DataError(f"{len(pairs)} pairs, at most {service.limits.max_hits} are allowed")
    with service.backend().current as lease:
        scorer = _present(lease.retriever.scorer, "scorer")
        schema.check_unicode([text for pair in pairs for text in pair])

        def tokens_of(query: str, text: str) -> Any:
            return scorer.tokens_of(query, Passage("", text))

        def work(items: list[tuple[str, str]]) -> list[float]:
            with lease:
                return [float(x) for x in scorer.score([(query, Passage("", text)) for query, text in items])]

        if whole:
            await _refuse_what_is_cut(caller, lease, tokens_of, pairs)
        scores = await caller.wait(service.batcher.run((lease, "score"), work, pairs))
    return _without_nan(scores, "scoring")


async def _refuse_what_is_cut(
    caller: Caller, lease: RetrieverLease, tokens_of: Callable[..., Any], items: list[Any]
) -> None:
    """Raise 413, as TEI, for a text or pair of which not all tokens would be read."""

    def work(items: list[Any]) -> list[Any]:
        with lease:
            return [tokens_of(*item) or (0, -1) for item in items]

    counting = caller.service.batcher.run((lease, "tokens", object()), work, items)
    for tokens, kept in _without_nan(await caller.wait(counting), "counting tokens"):
        if kept < 0:
            raise DataError("truncate: false cannot be promised: the model does not say what it cuts")
        if tokens > kept:
            raise HTTPException(413, f"inputs: one of {tokens} tokens or more, at most {kept} are read")


def _without_nan(rows: list[Any], what: str) -> list[Any]:
    """Return rows or scores; raises the first error among them, and refuses what holds NaN."""
    failed = next((row for row in rows if isinstance(row, Exception)), None)
    if failed is not None:
        raise HTTPException(503, f"{what} failed: {without_paths(f'{type(failed).__name__}: {failed}')}")
    if not all(np.isfinite(getattr(row, "data", row)).all() for row in rows):
        raise HTTPException(503, f"{what} failed: NaN or infinite")
    return rows


def _present(found: _Found | None, name: str) -> _Found:
    """Return what the retriever has; 404 where it has none."""
    if found is None:
        raise HTTPException(404, f"the retriever has no {name}")
    return found
