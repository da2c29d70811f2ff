"""The bodies that the server reads, typed: checked on arrival, and its OpenAPI description with examples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from data.errors import DataError


class Body(BaseModel):
    """A JSON object; fields that it does not know are passed over, as every client's own are."""

    model_config = ConfigDict(strict=True, extra="ignore")


Model = TypeVar("Model", bound=Body)


class Stage(Body):
    """One stage of a search: `retrieve` comes first, once; each `rerank` orders what the one before gave."""

    model_config = ConfigDict(extra="forbid")
    retrieve: str | None = Field(default=None, description="The backend that finds, by its name in /v1/info.")
    rerank: str | None = Field(default=None, description="The backend whose reranker orders anew.")
    k: int | None = Field(default=None, description="Hits that it gives; null: what the next looks at.")


class SearchBody(Body):
    """What `POST /v1/search` asks."""

    model_config = ConfigDict(
        extra="forbid",  # our own route: a misspelt `top_k` is no default
        json_schema_extra={
            "examples": [
                {"queries": ["longest river in France", "north sea"], "top_k": 3},
                {"queries": ["river"], "top_k": 1, "where": {"year": {"gte": 1990}}, "deadline_seconds": 2},
                {
                    "queries": ["river"],
                    "stages": [{"retrieve": "default", "k": 50}, {"rerank": "reranked", "k": 3}],
                },
            ]
        },
    )
    queries: list[str]
    top_k: int | None = Field(None, description="Passages a query; null: the server's default.")
    where: dict[str, Any] | None = Field(
        None, description='Filter on metadata: {"f": v}, {"f": {"in": [v]}}, {"f": {"gte": a, "lt": b}}.'
    )
    backend: str | None = Field(None, description="Which retriever, by its name in /v1/info.")
    stages: list[Stage] | None = Field(
        None, min_length=1, max_length=4, description="Instead of backend: who finds, and who orders it anew."
    )
    deadline_seconds: float | None = Field(None, gt=0, description="Answer 504 if it takes longer.")


class FoundPassage(BaseModel):
    """A hit of `/v1/search`."""

    id: str
    title: str
    text: str
    metadata: dict[str, Any]
    score: float
    generation: str


class QueryResult(BaseModel):
    """The hits of one query, or why there are none."""

    hits: list[FoundPassage]
    error: str | None


class StageReport(BaseModel):
    """What a stage was: its backend, how many hits it gave at most, and the generation of these."""

    retrieve: str | None = None
    rerank: str | None = None
    k: int
    generation: str


class SearchReply(BaseModel):
    """One result a query, in their order; `stages` where some were asked for."""

    results: list[QueryResult]
    backend: str
    generation: str
    stages: list[StageReport] | None = None


class RetrieveBody(Body):
    """What any dialect of `POST /retrieve` asks: one of `queries` and `query`, one name of top k."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"queries": ["longest river in France"], "topk": 3, "return_scores": True},
                {"query": "longest river in France", "top_k": 3},
            ]
        }
    )
    queries: list[str] | None = None
    query: str | None = None
    topk: int | None = None
    topk_rerank: int | None = None
    top_k: int | None = None
    k: int | None = None
    top_n: int | None = None
    return_scores: bool | None = None
    return_score: bool | None = None


class SingleSearchBody(Body):
    """`POST /search` of ReCall (`query`, `top_n`) and of Serper's clients (`q`, `num`)."""

    query: str | None = None
    q: str | None = None
    top_n: int | None = None
    num: int | None = None
    return_score: bool = False


class BatchSearchBody(Body):
    """`POST /batch_search` of ReCall."""

    query: list[str]
    top_n: int | None = None
    return_score: bool = False


class AccessBody(Body):
    """`POST /access` of ASearcher: pages of the corpus, by their id or url."""

    urls: list[str]


class EmbedBody(Body):
    """TEI's `/embed`, `/embed_sparse` and `/embed_all`."""

    inputs: str | list[str]
    normalize: bool = True
    prompt_name: str | None = Field(None, description='"query" for queries; otherwise passages.')
    dimensions: int | None = Field(None, ge=1)


class RerankBody(Body):
    """TEI's `/rerank` (`query`, `texts`) and Search-R1's (`queries`, `documents`, `rerank_topk`)."""

    query: str | None = None
    texts: list[str] = []
    raw_scores: bool = False
    return_text: bool = False
    queries: list[str] | None = None
    documents: list[list[dict[str, Any]]] = []
    rerank_topk: int | None = Field(None, ge=1)
    return_scores: bool = False


class EmbeddingsBody(Body):
    """OpenAI's `/v1/embeddings`; `is_query` as PyLate sends it."""

    input: str | list[str]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    is_query: bool = False


class Trouble(BaseModel):
    """Why a request was not answered."""

    detail: str


def parse(model: type[Model], body: Any) -> Model:
    """`body` checked; DataError "field: what is wrong" for the first thing that is."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "body"
        raise DataError(f"{place}: {first['msg']}") from None


def documented(model: type[Body]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads `model`."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})  # a reference would be looked for in the whole description
    inlined = json.loads(json.dumps(schema), object_hook=lambda node: _inline(node, parts))
    content = {"application/json": {"schema": inlined}}
    return {"requestBody": {"required": True, "content": content}}


def _inline(node: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """What a `{"$ref": "#/$defs/NAME"}` names."""
    return parts[node["$ref"].rpartition("/")[2]] if "$ref" in node else node


async def read(request: Request, model: type[Model], max_bytes: int) -> Model:
    """The body as `model`, read no further than the limit, whatever its Content-Type says."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise HTTPException(413, f"body: more than {max_bytes} bytes")
    try:
        content = json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"body: not JSON ({error})") from error
    return parse(model, content)


def reply(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`content` as JSON, in ASCII: whatever a client sent can be sent back."""
    return Response(json.dumps(content), status, headers, media_type="application/json")
