"""Searches of other projects' clients: what each asks, and the shape in which it reads the answer.

    Search-R1, verl, slime  {"queries", "topk", "return_scores"}  {"result": [[{"document", "score"}]]}
    SkyRL                   {"query", "topk", "return_scores"}    the same, one row
    GEM                     the same, in MessagePack              {"result": [{"document", "score"}]}
    BrowseComp-Plus, LRAT   {"query"}                             {"result": [{"document", "docid"}]}
    rLLM                    {"query", "top_k"} (and "k")          {"query", "results", "num_results"}
    ZeroSearch              {"query", "top_k"}                    [{"text"}]
    ASearcher               as Search-R1, without scores          documents that have a "url"
    ReCall                  {"query", "top_n", "return_score"}    [{"id", "contents"}] or [those, scores]
    Serper's clients        {"q", "num"}                          {"organic": [{"title", "link", "snippet"}]}
    Tavily                  {"query"} (and "max_results", ...)    {"results": [{"title", "url", "content"}]}
    Exa                     {"query", "contents", "numResults"}   {"results": [{"id", "url", "text"}]}

What two of them ask alike is answered as `dialect` says. Any of them may name a filter `where`, a `backend`
and `deadline_seconds`, as `/v1/search` has them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response

from data.errors import ConfigError, DataError
from data.records import Hit
from retriever_server.client.wire import render_document, render_hits
from retriever_server.server import reply_schema
from retriever_server.server.errors import ANY_SEARCH, error_replies
from retriever_server.server.middleware import JsonRoute, parse_body
from retriever_server.server.replies import LONG_ANSWER, JsonReply
from retriever_server.server.schema import (
    AccessBody,
    BatchSearchBody,
    PackedBody,
    RetrieveBody,
    SearchOptions,
    SingleSearchBody,
)
from retriever_server.server.service import Caller, CallerOf, Found

DIALECTS = ("rllm", "zerosearch", "search-r1", "skyrl", "asearcher")
_TOP_K_NAMES = ("topk", "topk_rerank", "top_k", "k", "top_n")
_PACKED = tuple(bytes([first]) for first in range(0x80, 0xE0))
"""The first byte of all but small numbers in MessagePack; no JSON begins with one."""


class _PackedRoute(JsonRoute):
    """Reads MessagePack, too, whatever type the request says."""

    async def read(self, request: Request) -> Any:
        content = await request.body()
        if self._model is not RetrieveBody or not content.startswith(_PACKED):
            return await super().read(request)
        msgpack = _msgpack()
        try:
            unpacked = msgpack.unpackb(content)
        except ValueError as error:
            raise HTTPException(400, f"body: neither JSON nor MessagePack ({error})") from error
        if not isinstance(unpacked, dict):
            raise HTTPException(422, f"body: MessagePack of {type(unpacked).__name__}, must be a map")
        return parse_body(PackedBody, unpacked)


class PackedReply(JsonReply):
    """MessagePack, to those who asked in it."""

    media_type = "application/msgpack"

    def render(self, content: Any) -> bytes:
        return _msgpack().packb(content)


def _msgpack() -> Any:
    try:
        import msgpack  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ConfigError("body: MessagePack needs a package: pip install 'sleuth-rl[msgpack]'") from error
    return msgpack


router = APIRouter(route_class=_PackedRoute, responses=error_replies(*ANY_SEARCH))


@router.post("/retrieve", response_model=reply_schema.RetrieveReply)
async def retrieve(body: RetrieveBody, caller: CallerOf) -> Response:
    """Search as Search-R1, verl, slime, SkyRL, rLLM, ZeroSearch, ASearcher, GEM and LRAT do."""
    return await _answer(parse_retrieve(body, caller.service.dialect), body, caller)


@router.post("/search", response_model=reply_schema.SingleSearchReply)
async def search(body: SingleSearchBody, caller: CallerOf) -> Response:
    """Search as the clients of ReCall, Serper, Exa and Tavily do, told apart by their keys."""
    return await _answer(parse_search(body), body, caller)


@router.post("/batch_search", response_model=reply_schema.ReCallBatchReply)
async def batch_search(body: BatchSearchBody, caller: CallerOf) -> Response:
    """Search for several queries as ReCall does."""
    request = DialectRequest(body.query, "top_n", body.top_n, "recall-batch", body.return_score)
    return await _answer(request, body, caller)


@router.post("/access", response_model=reply_schema.AccessReply)
async def access(body: AccessBody, caller: CallerOf) -> Response:
    """Return pages of the corpus by id or url; null for what is not in it. Nothing else is ever fetched."""
    service = caller.service
    if len(body.urls) > service.limits.max_queries:
        raise DataError(f"urls: {len(body.urls)}, at most {service.limits.max_queries} are allowed")
    pages = await service.fetch(body.urls, body.whole)
    return JsonReply({"result": [{"contents": page.contents} if page else None for page in pages]})


async def _answer(request: DialectRequest, options: SearchOptions, caller: Caller) -> Response:
    if request.top_k is not None:
        caller.service.check_top_k(request.top_k, request.top_k_name)
    rankings, found = await caller.rank(request.queries, request.top_k, options)

    def write() -> Response:
        reply = PackedReply if isinstance(options, PackedBody) else JsonReply
        return reply(_SHAPES[request.shape](request, rankings, found))

    return await asyncio.to_thread(write) if len(rankings) > LONG_ANSWER else write()


@dataclass(frozen=True)
class DialectRequest:
    """A search of a client of any dialect."""

    queries: list[str]
    top_k_name: str
    """The client's name for `top_k`."""
    top_k: int | None
    shape: str
    """Key of _SHAPES."""
    return_scores: bool = False


Rankings = list[list[Hit]]
Shape = Callable[[DialectRequest, Rankings, Found], Any]


def parse_retrieve(body: RetrieveBody, dialect: str) -> DialectRequest:
    """Return the search of a `POST /retrieve`, and the shape of its answer."""
    name = next((name for name in _TOP_K_NAMES if getattr(body, name) is not None), "topk")
    top_k = name, getattr(body, name)
    scored = bool(body.return_scores or body.return_score)
    if body.queries is not None:
        return DialectRequest(body.queries, *top_k, "asearcher" if dialect == "asearcher" else "rows", scored)
    if body.query is None:
        raise DataError("queries: must be a list of strings (or query a string)")
    if isinstance(body, PackedBody) or (dialect == "rllm" and top_k[1] is None):
        return DialectRequest([body.query], *top_k, "flat", True)
    if body.topk is not None or dialect not in ("rllm", "zerosearch"):
        return DialectRequest([body.query], *top_k, "rows", scored)
    both = body.top_k is not None and body.k is not None
    return DialectRequest([body.query], *top_k, "rllm" if both else dialect)


def parse_search(body: SingleSearchBody) -> DialectRequest:
    """Return the search of a `POST /search`, and the shape of its answer."""
    if body.query is None and body.q is None:
        raise DataError("query: must be a string")
    if body.query is None:
        return DialectRequest([body.q or ""], "num", body.num, "serper")
    if body.top_n is not None or body.return_score is not None:
        return DialectRequest([body.query], "top_n", body.top_n, "recall", bool(body.return_score))
    if body.contents is not None or body.numResults is not None:
        return DialectRequest([body.query], "numResults", body.numResults, "exa")
    return DialectRequest([body.query], "max_results", body.max_results, "tavily")


def url_of(hit: Hit) -> str:
    """Return where `/access` finds the passage: its own url if its metadata has one, else its id."""
    return str(hit.passage.metadata.get("url") or hit.passage.id)


def _rows(request: DialectRequest, rankings: Rankings, found: Found) -> Any:
    return render_hits(rankings, found.generation, request.return_scores, found.linked)


def _flat(request: DialectRequest, rankings: Rankings, found: Found) -> Any:
    answer = render_hits(rankings, found.generation, True, found.linked)
    hits = [{**item, "docid": item["document"]["id"]} for item in answer["result"][0]]
    return {**answer, "result": hits}


def _asearcher(request: DialectRequest, rankings: Rankings, found: Found) -> Any:
    answer = render_hits(rankings, found.generation, request.return_scores, found.linked)
    for row, hits in zip(answer["result"], rankings, strict=True):
        for item, hit in zip(row, hits, strict=True):
            item.get("document", item)["url"] = url_of(hit)
    return answer


def _rllm(request: DialectRequest, rankings: Rankings, found: Found) -> Any:
    results = [
        {
            "id": hit.passage.id,
            "content": hit.passage.given_contents,
            "score": hit.score,
            "document": render_document(hit, found.linked),  # where its own tool looks
        }
        for hit in rankings[0]
    ]
    named = {"query": request.queries[0], "method": found.generation}
    return {**named, "results": results, "num_results": len(results), "generation": found.generation}


def _zerosearch(request: DialectRequest, rankings: Rankings, found: Found) -> Any:
    return [{"text": hit.passage.given_contents} for hit in rankings[0]]


def _recall(request: DialectRequest, rankings: Rankings, found: Found) -> Any:
    documents = [
        [{"id": hit.passage.id, "contents": hit.passage.given_contents} for hit in row] for row in rankings
    ]
    scores = [[hit.score for hit in row] for row in rankings]
    if request.shape == "recall":
        return [documents[0], scores[0]] if request.return_scores else documents[0]
    return [documents, scores] if request.return_scores else documents


def _serper(request: DialectRequest, rankings: Rankings, found: Found) -> Any:
    organic = [
        {"title": hit.passage.title, "link": url_of(hit), "snippet": hit.passage.text, "position": rank}
        for rank, hit in enumerate(rankings[0], start=1)
    ]
    return {"searchParameters": {"q": request.queries[0]}, "organic": organic}


def _web(request: DialectRequest, rankings: Rankings, found: Found) -> Any:
    text = "text" if request.shape == "exa" else "content"  # an Exa client without one asks as Tavily's do
    results = [
        {
            "id": hit.passage.id,
            "url": url_of(hit),
            "title": hit.passage.title,
            "score": hit.score,
            text: hit.passage.text,
        }
        for hit in rankings[0]
    ]
    return {"query": request.queries[0], "results": results}


_SHAPES: dict[str, Shape] = {
    "rows": _rows,
    "flat": _flat,
    "asearcher": _asearcher,
    "rllm": _rllm,
    "zerosearch": _zerosearch,
    "recall": _recall,
    "recall-batch": _recall,
    "serper": _serper,
    "exa": _web,
    "tavily": _web,
}
