"""The bodies that the server reads, typed: checked on arrival, and its OpenAPI description with examples."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response

from data.errors import DataError, RetrieverError
from data.images import needs_images


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


class Pictured(Body):
    """What holds an image, or may: asked of /v1/search, given to /embed."""

    model_config = ConfigDict(extra="forbid")
    image: str | None = Field(
        None, description="A PNG, JPEG, WebP, GIF, BMP or TIFF file in base64, or as data: URL; no other URL."
    )
    text: str = Field("", description="What is said with the image, or alone.")


def _kind(value: Any) -> str:
    return "item" if isinstance(value, dict | Pictured) else "text"


def _kind_or_list(value: Any) -> str:
    return "list" if isinstance(value, list) else _kind(value)


TextOrImage = Annotated[
    Annotated[str, Tag("text")] | Annotated[Pictured, Tag("item")],
    Discriminator(_kind),
]
OneOrMore = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[Pictured, Tag("item")]
    | Annotated[list[TextOrImage], Tag("list")],
    Discriminator(_kind_or_list),
]


class Narrowed(Body):
    """What any search may say of who answers, out of which passages, and when."""

    where: dict[str, Any] | None = Field(
        None, description='Filter on metadata: {"f": v}, {"f": {"in": [v]}}, {"f": {"gte": a, "lt": b}}.'
    )
    backend: str | None = Field(None, description="Which retriever, by its name in /v1/info.")
    deadline_seconds: float | None = Field(None, gt=0, description="Answer 504 if it takes longer.")


class SearchBody(Narrowed):
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
                {"queries": ["river", {"text": "a chart of its depth"}], "top_k": 1},
            ]
        },
    )
    queries: list[TextOrImage]
    top_k: int | None = Field(None, description="Passages a query; null: the server's default.")
    stages: list[Stage] | None = Field(
        None, min_length=1, max_length=4, description="Instead of backend: who finds, and who orders it anew."
    )


class FoundPassage(BaseModel):
    """A hit of `/v1/search`."""

    id: str
    title: str
    text: str
    contents: str | None = Field(
        None, description="Both in one as the corpus has them, where they do not give that back."
    )
    metadata: dict[str, Any]
    thumbnail: str | None = Field(None, description="Where its picture is, if it has one.")
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


class RetrieveBody(Narrowed):
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


class SingleSearchBody(Narrowed):
    """`POST /search` of ReCall (`query`, `top_n`) and of Serper's clients (`q`, `num`)."""

    query: str | None = None
    q: str | None = None
    top_n: int | None = None
    num: int | None = None
    return_score: bool = False


class BatchSearchBody(Narrowed):
    """`POST /batch_search` of ReCall."""

    query: list[str]
    top_n: int | None = None
    return_score: bool = False


class AccessBody(Body):
    """`POST /access` of ASearcher: pages of the corpus, by their id or url."""

    urls: list[str]


class Truncated(Body):
    """How TEI says what happens to texts that are longer than the model reads."""

    truncate: bool | None = Field(None, description="false: refuse them with 413; else their end is cut.")
    truncation_direction: Literal["Right", "right"] | None = Field(None, description="The end is cut.")


class EmbedBody(Truncated):
    """TEI's `/embed`, `/embed_sparse` and `/embed_all`."""

    inputs: OneOrMore
    normalize: bool = True
    prompt_name: Literal["query", "passage", "document"] | None = Field(
        None, description="What the texts are; without it passages, as document."
    )
    dimensions: int | None = Field(None, ge=1)


class RerankBody(Truncated):
    """TEI's `/rerank` (`query`, `texts`) and Search-R1's (`queries`, `documents`, `rerank_topk`)."""

    query: str | None = None
    texts: list[str] = []
    raw_scores: bool = False
    return_text: bool = False
    queries: list[str] | None = None
    documents: list[list[dict[str, Any]]] = []
    rerank_topk: int | None = Field(None, ge=1)
    return_scores: bool = False


class Weight(BaseModel):
    """A weight of a sparse vector."""

    index: int
    value: float


class Scored(BaseModel):
    """How well the text at `index` of a `/rerank` answers."""

    index: int
    score: float
    text: str | None = None


class EmbeddingsBody(Body):
    """OpenAI's `/v1/embeddings`; `is_query` as PyLate sends it."""

    input: OneOrMore
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    is_query: bool = False


class Trouble(BaseModel):
    """Why a request was not answered."""

    detail: str


def troubles(own: bool = True, absent: bool = False) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route for what may go wrong: of our own /v1, or as other projects' clients read it.

    absent: what is asked for may not be there.
    """
    busy = "Too many queries wait; Retry-After says when to come back"
    described = {
        400: "Not JSON",
        401: "No token",
        **({404: "There is no such thing here"} if absent else {}),
        413: "Too large",
        421: "Asked under a name that this server does not go by",
        422: "A wrong value",
        **({429: busy} if own else {}),
        500: "An error of the server's own",
        501: "A package that reads images or forms is not installed",
        503: "The search failed" if own else f"The search failed. {busy}",
        504: "The deadline has passed",
    }
    return {status: {"model": Trouble, "description": text} for status, text in described.items()}


def parse(model: type[Model], body: Any) -> Model:
    """`body` checked; DataError "field: what is wrong" for the first thing that is."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise DataError(first_of(error.errors(include_url=False, include_input=False))) from None


def first_of(errors: Sequence[Any]) -> str:
    """The first of a validator's errors: "field: what is wrong"."""
    place = ".".join(map(str, errors[0]["loc"])) or "body"
    objects = errors[0]["type"] in ("model_type", "dict_type")  # whose message names a class of ours
    return f"{place}: {'must be a JSON object' if objects else errors[0]['msg']}"


def documented(model: type[Body]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads `model`."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})  # a reference would be looked for in the whole description
    inlined = json.loads(json.dumps(schema), object_hook=lambda node: _inline(node, parts))
    content = {"application/json": {"schema": inlined}}
    if model is SearchBody:
        content["multipart/form-data"] = {"schema": _form_of(inlined)}
    return {"requestBody": {"required": True, "content": content}}


def _inline(node: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """What a `{"$ref": "#/$defs/NAME"}` names."""
    return parts[node["$ref"].rpartition("/")[2]] if "$ref" in node else node


def _form_of(search: dict[str, Any]) -> dict[str, Any]:
    """The fields of the same search as a form: `queries` are its images, each with its text."""
    fields = {name: field for name, field in search["properties"].items() if name != "queries"}
    image = {"type": "array", "items": {"type": "string", "format": "binary"}, "description": "Files."}
    text = {"type": "string", "description": "A query, or what is said with each image."}
    return {"type": "object", "properties": {"image": image, "text": text, **fields}}


async def read_search(request: Request, max_bytes: int) -> SearchBody:
    """What /v1/search is asked, in JSON or as a form with files."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return await read(request, SearchBody, max_bytes)
    body = await _read_bytes(request, max_bytes)

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    with needs_images("a form"):
        import python_multipart  # what Starlette reads forms with
    try:
        form = await MultiPartParser(request.headers, stream(), max_part_size=max_bytes).parse()
    except MultiPartException as error:
        raise HTTPException(400, f"body: {error.message}") from error
    _, options = python_multipart.multipart.parse_options_header(request.headers["content-type"])
    if b"--" + options[b"boundary"] + b"--" not in body:  # the parser passes over a file without its end
        raise HTTPException(400, "body: the form is cut short (its last boundary is missing)")
    try:
        asked = parse(SearchBody, await _search_in(form))
    finally:
        await form.close()
    if not asked.queries:
        raise DataError("body: a form asks by `image`, a file, and `text`, and has neither")
    return asked


async def _search_in(form: FormData) -> dict[str, Any]:
    """The body that says the same as a form; other fields than `text` and `backend` are JSON."""
    body, text, images = {}, "", []
    for name, value in form.multi_items():
        if isinstance(value, UploadFile) != (name == "image") or name == "queries":
            raise DataError(f"{name[:40]}: a form asks by `image`, a file, and `text`")
        if isinstance(value, UploadFile):
            coded = base64.b64encode(await value.read()).decode()
            images.append(f"data:{value.content_type or ''};base64,{coded}")
        elif name == "text":
            text = value
        else:
            body[name] = value if name == "backend" else _json_or_text(value)
    pictured = [{"image": image, "text": text} for image in images]
    return {**body, "queries": pictured or ([text] if text else [])}


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


async def read(request: Request, model: type[Model], max_bytes: int) -> Model:
    """The body as `model`, read no further than the limit, whatever its Content-Type says."""
    try:
        content = json.loads(await _read_bytes(request, max_bytes))
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"body: not JSON ({error})") from error
    return parse(model, content)


async def _read_bytes(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise HTTPException(413, f"body: more than {max_bytes} bytes")
    return bytes(body)


def reply(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`content` as JSON, in ASCII: whatever a client sent can be sent back.

    Raises RetrieverError for what is no JSON, such as NaN in the metadata of a passage.
    """
    try:
        return Response(_render(content), status, headers, media_type="application/json")
    except (ValueError, TypeError) as error:
        raise RetrieverError(f"what was found cannot be sent as JSON: {error}") from error


def _render(content: Any) -> str:
    """JSON, written in pieces: in a thread, a long answer does not hold up the others."""
    if isinstance(content, dict):
        fields = (f"{json.dumps(name)}: {_render(value)}" for name, value in content.items())
        return f"{{{', '.join(fields)}}}"
    if isinstance(content, list):
        return f"[{', '.join([json.dumps(item, allow_nan=False) for item in content])}]"
    return json.dumps(content, allow_nan=False)
