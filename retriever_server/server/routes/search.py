"""`POST /v1/search`, in JSON or as a form with files, and the thumbnails of what it finds."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from data.errors import DataError
from data.pages.images import needs_images
from data.records import Hit
from retriever_server.client.wire import thumbnail_link
from retriever_server.server.errors import ANY_SEARCH, QueryFailed, error_replies
from retriever_server.server.middleware import JsonRoute, parse_body
from retriever_server.server.replies import LONG_ANSWER, JsonReply
from retriever_server.server.reply_schema import SearchReply
from retriever_server.server.schema import SearchBody, SearchForm
from retriever_server.server.service import CallerOf, Outcome


class _SearchRoute(JsonRoute):
    """Reads a form, too."""

    async def read(self, request: Request) -> Any:
        is_form = request.headers.get("content-type", "").lower().startswith("multipart/form-data")
        return await (_read_form(request) if is_form else super().read(request))


router = APIRouter(route_class=_SearchRoute, responses=error_replies(*ANY_SEARCH, 429))
_FORM = SearchForm.model_json_schema(ref_template="#/components/schemas/{model}")
_FORM.pop("$defs")  # they are among the components: a body in JSON has them, too


@router.post(
    "/v1/search",
    response_model=SearchReply,
    openapi_extra={"requestBody": {"content": {"multipart/form-data": {"schema": _FORM}}}},
)
async def search(body: SearchBody, caller: CallerOf) -> Response:
    """Return the best passages of each query; a query that fails has an error instead of hits."""
    found = await caller.search(body.queries, body.top_k, body, body.stages)

    def write() -> Response:
        results = [_render_result(outcome, found.linked) for outcome in found.outcomes]
        answer: dict[str, Any] = {
            "results": results,
            "backend": found.backend,
            "generation": found.generation,
        }
        if body.stages:
            answer["stages"] = [
                {**stage.model_dump(exclude_none=True), "k": k, "generation": name}
                for stage, (k, name) in zip(body.stages, found.stages, strict=True)
            ]
        return JsonReply(answer)

    return await asyncio.to_thread(write) if len(found.outcomes) > LONG_ANSWER else write()


@router.get(
    "/v1/thumbnail/{passage_id:path}",
    response_class=Response,
    responses={200: {"content": {"image/jpeg": {}}}, **error_replies(404)},
)
async def thumbnail(
    passage_id: str, caller: CallerOf, side: int = 256, backend: str | None = None
) -> Response:
    """Return the picture of a passage of the corpus, at most `side` pixels wide and high; nothing else."""
    service = caller.service
    with service.backend(backend).current as lease:
        made = await caller.wait(service.images.thumbnail(lease, passage_id, side))
    if made is None:
        raise HTTPException(404, f"no picture of a passage {passage_id[:80]!r}")
    return Response(made, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=300"})


def _render_result(outcome: Outcome, backend: str | None) -> dict[str, Any]:
    if isinstance(outcome, Exception):
        return {"hits": [], "error": str(QueryFailed(outcome))}
    return {"hits": [render_hit(hit, backend) for hit in outcome], "error": None}


def render_hit(hit: Hit, backend: str | None) -> dict[str, Any]:
    """Return the JSON of a hit; backend: that of the link to its picture, where it is not the default."""
    passage = hit.passage
    fields = {"id": passage.id, "title": passage.title, "text": passage.text, "metadata": passage.metadata}
    if passage.verbatim:
        fields["contents"] = passage.verbatim
    if passage.image:
        fields["thumbnail"] = thumbnail_link(passage, backend)
    return {**fields, "score": hit.score, "generation": hit.generation}


async def _read_form(request: Request) -> SearchBody:
    """Return the search that a form asks for. Raises HTTPException with 400 for what is no whole form."""
    body = await request.body()
    with needs_images("a form"):
        import python_multipart  # what Starlette reads forms with
    try:
        form = await request.form(max_part_size=max(len(body), 1))
    except HTTPException as error:
        raise HTTPException(400, f"body: {error.detail}") from None
    _, options = python_multipart.multipart.parse_options_header(request.headers["content-type"])
    if b"--" + options[b"boundary"] + b"--" not in body:  # the parser passes over a file without its end
        raise HTTPException(400, "body: the form is cut short (its last boundary is missing)")
    search = parse_body(SearchBody, await _search_in(form))
    if not search.queries:
        raise DataError("body: a form asks by `image`, a file, and `text`, and has neither")
    return search


async def _search_in(form: FormData) -> dict[str, Any]:
    """Return the JSON body that says the same; other fields than `text` and `backend` are JSON."""
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
