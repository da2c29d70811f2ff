"""The JSON of Search-R1's `POST /retrieve`, both ends; of our own `POST /v1/search`, as a client needs it.

    {"queries": ["..."], "topk": 3 | null, "return_scores": false}
    return_scores true  -> {"result": [[{"document": {...}, "score": 0.83}, ...], ...]}
    return_scores false -> {"result": [[{...}, ...], ...]}

One row a query, in their order. A document has id, title, text and contents: the quoted title and the text in
one field, which is all that some servers send. Ours names the `generation` beside the result, and where a
passage is a picture the link to its `thumbnail`. A picture travels as bytes, in base64: no file and no URL of
one end is ever opened by the other.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from data.errors import DataError, RetrieverError
from data.records import Hit, Input, Item, Passage, split_contents
from data.text import is_unicode

THUMBNAIL = "/v1/thumbnail/"
"""Path at which a server shows the picture of a passage: followed by its id."""


def render_hits(
    rankings: list[list[Hit]], generation: str, return_scores: bool, backend: str | None = None
) -> dict[str, Any]:
    """Return the JSON body of an answer: one row a query. The hits' own generation, if it is one, is named.

    backend: that of the links to pictures, where it is not the default.
    """
    found = {hit.generation for ranking in rankings for hit in ranking}
    generation = found.pop() if len(found) == 1 else generation
    render = _render_scored if return_scores else render_document
    rows = [[render(hit, backend) for hit in ranking] for ranking in rankings]
    return {"result": rows, "generation": generation}


def parse_hits(body: Any, url: str = "") -> list[list[Hit]]:
    """Return the hits in a decoded JSON answer, of ours or of any Search-R1 server, in either score mode.

    Score 0.0 and generation "" where the server sends none; a document of a web search goes by its
    url, or where it is nothing but `contents`, as of Search-R1's web servers, by a hash of them. The image of
    a passage that has one is the address of its thumbnail at `url`, the server's. Raises DataError for
    anything else: no id, a score that is no finite number, a field of another type.
    """
    rows = body.get("result") if isinstance(body, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise DataError("the answer has no `result` that is a list of rows")
    generation = _checked_text("generation", body.get("generation") or "")
    return [[_parse_hit(item, generation, url) for item in row] for row in rows]


def render_search(queries: Sequence[Input], k: int, where: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the JSON body that asks `/v1/search`; images must be bytes (`with_image_bytes`)."""
    body = {"queries": [_render_query(query) for query in queries], "top_k": k}
    return body if where is None else {**body, "where": where}


def parse_results(answer: Any, url: str = "") -> list[list[Hit] | RetrieverError]:
    """Return the hits or the error of each query in an answer of `/v1/search`; images as in `parse_hits`."""
    try:
        return [
            RetrieverError(_checked_text("error", result["error"]))
            if result["error"]
            else [_found_hit(hit, url) for hit in _checked("hits", result["hits"], list)]
            for result in _checked("results", answer["results"], list)
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"no answer of /v1/search ({error!r})") from error


def with_image_bytes(query: Input) -> Input:
    """Return the query with the bytes of its image in it, read here. DataError naming the file."""
    if isinstance(query, str):
        return query
    if query.modality != "image":
        raise DataError(f"a query of {query.modality}: a server is asked with texts and images")
    if isinstance(query.image, bytes):
        return query
    from data.pages.images import png, read_image, split_page

    file, page = split_page(query.image)
    try:
        content = Path(file).read_bytes() if page is None else png(read_image(query.image))
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from error
    return replace(query, image=content)


def thumbnail_link(passage: Passage, backend: str | None = None) -> str:
    """Return the path at which a server shows the image of the passage, of the corpus of this backend."""
    of = "" if backend is None else f"?backend={quote(backend)}"
    return THUMBNAIL + quote(passage.id, safe="", errors="replace") + of


def _render_query(query: Input) -> str | dict[str, str]:
    if isinstance(query, str):
        return query
    assert isinstance(query, Item) and isinstance(query.image, bytes)
    return {"text": query.text, "image": base64.b64encode(query.image).decode()}


def _found_hit(hit: Mapping[str, Any], url: str) -> Hit:
    title, text = _checked_text("title", hit["title"]), _checked_text("text", hit["text"])
    passage = Passage(_checked_id(hit), text, title, _checked("metadata", hit["metadata"], dict))
    return _hit(passage, hit, hit["score"], _checked_text("generation", hit["generation"]), url)


def render_document(hit: Hit, backend: str | None = None) -> dict[str, Any]:
    """Return the passage as its JSON; metadata only where there is any, and its url beside the text."""
    passage = hit.passage
    document: dict[str, Any] = {
        "id": passage.id,
        "title": passage.title,
        "text": passage.text,
        "contents": passage.given_contents,
    }
    if passage.metadata:
        document["metadata"] = passage.metadata
        if "url" in passage.metadata:
            document["url"] = passage.metadata["url"]
    if passage.image:
        document["thumbnail"] = thumbnail_link(passage, backend)
    return document


def _render_scored(hit: Hit, backend: str | None) -> dict[str, Any]:
    return {"document": render_document(hit, backend), "score": hit.score}


def _parse_hit(item: Any, generation: str, url: str) -> Hit:
    document, score = item, 0.0
    if isinstance(item, dict) and "document" in item:
        document, score = item["document"], item.get("score", 0.0)
    title, text = _title_and_text(_checked("document", document, dict))
    metadata = _checked("metadata", document.get("metadata") or {}, dict)
    if isinstance(document.get("url"), str):
        metadata = {"url": document["url"], **metadata}
    if item == {"document": {"contents": document.get("contents")}}:
        document = {**document, "id": hashlib.sha256(document["contents"].encode()).hexdigest()[:16]}
    return _hit(Passage(_checked_id(document), text, title, metadata), document, score, generation, url)


def _hit(passage: Passage, document: Mapping[str, Any], score: Any, generation: str, url: str) -> Hit:
    """The hit of a passage whose text may stand otherwise in the document, which may have a picture."""
    if (contents := document.get("contents")) is not None:
        passage = passage.keep_verbatim(_checked_text("contents", contents))
    if document.get("thumbnail"):
        passage = replace(passage, image=url + thumbnail_link(passage))
    return Hit(passage, _checked_score(score), generation)


def _checked(name: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise DataError(f"the answer's {name} must be {kind.__name__}, found {json.dumps(value)[:40]}")
    return value


def _checked_text(name: str, value: Any) -> str:
    if not is_unicode(_checked(name, value, str)):
        raise DataError(f"the answer's {name} is not Unicode: half a surrogate pair")
    return value


def _checked_id(document: Mapping[str, Any]) -> str:
    """Return the id of a passage, a string or an integer; its url where it has none, as pages of the web."""
    found = document.get("id", document.get("url"))
    if found in (None, "") or isinstance(found, bool):
        raise DataError("the answer has a passage without an id")
    return _checked_text("id", str(found) if isinstance(found, int) else found)


def _checked_score(value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not -sys.float_info.max <= value <= sys.float_info.max:
        raise DataError(f"the answer's score must be a finite number, found {json.dumps(value)[:40]}")
    return float(value)


def _title_and_text(document: Mapping[str, Any]) -> tuple[str, str]:
    """Return title and text of a document with `contents`, `text`, or both; DataError where there is neither.

    Search-R1's BM25 server sends all three, the title without quotes at its ends: there `contents` says it.
    """
    title, text, contents = (document.get(name) for name in ("title", "text", "contents"))
    if text is None and contents is None:
        raise DataError("a document of the answer has neither `text` nor `contents`")
    if contents is not None:
        first, _, rest = _checked_text("contents", contents).partition("\n")
        if text is None or (title, text) == (first.strip('"'), rest):
            return split_contents(contents)
    return _checked_text("title", title or ""), _checked_text("text", text).strip()
