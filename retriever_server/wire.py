"""The JSON of Search-R1's `POST /retrieve`, both ends.

    {"queries": ["..."], "topk": 3 | null, "return_scores": false}
    return_scores true  -> {"result": [[{"document": {...}, "score": 0.83}, ...], ...]}
    return_scores false -> {"result": [[{...}, ...], ...]}

One row a query, in their order, whatever their number. A document has id, title, text and
contents: the quoted title and the text in one field, which is all that some servers send. Ours
names the `generation` beside the result; clients that do not know it pass over it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data.errors import DataError
from data.records import Hit, Passage


@dataclass(frozen=True)
class RetrieveRequest:
    """What a client asks; `top_k` None leaves the number of hits to the server."""

    queries: list[str]
    top_k: int | None = None
    return_scores: bool = False


def render_request(request: RetrieveRequest) -> dict[str, Any]:
    """The JSON body that asks for it."""
    return {
        "queries": request.queries,
        "topk": request.top_k,
        "return_scores": request.return_scores,
    }


def render_hits(rankings: list[list[Hit]], generation: str, return_scores: bool) -> dict[str, Any]:
    """The JSON body of an answer: one row a query. The hits' own generation, if it is one, is named."""
    found = {hit.generation for ranking in rankings for hit in ranking}
    generation = found.pop() if len(found) == 1 else generation
    render = _render_scored if return_scores else render_document
    rows = [[render(hit) for hit in ranking] for ranking in rankings]
    return {"result": rows, "generation": generation}


def parse_hits(body: Any) -> list[list[Hit]]:
    """The hits in a decoded JSON answer, of ours or of any Search-R1 server, in either score mode.

    Score 0.0 and generation "" where the server sends none. Raises DataError for anything else.
    """
    rows = body.get("result") if isinstance(body, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise DataError("the answer has no `result` that is a list of rows")
    generation = str(body.get("generation", ""))
    return [[_parse_hit(item, generation) for item in row] for row in rows]


def render_document(hit: Hit) -> dict[str, Any]:
    """The passage as its JSON; metadata only where there is any, and its url beside the text."""
    passage = hit.passage
    document: dict[str, Any] = {
        "id": passage.id,
        "title": passage.title,
        "text": passage.text,
        "contents": passage.contents,
    }
    if passage.metadata:
        document["metadata"] = passage.metadata
        if "url" in passage.metadata:
            document["url"] = passage.metadata["url"]
    return document


def _render_scored(hit: Hit) -> dict[str, Any]:
    return {"document": render_document(hit), "score": hit.score}


def _parse_hit(item: Any, generation: str) -> Hit:
    document, score = item, 0.0
    if isinstance(item, dict) and "document" in item:
        document, score = item["document"], item.get("score", 0.0)
    if not isinstance(document, dict) or not isinstance(score, int | float):
        raise DataError("a hit of the answer is no document with a number as its score")
    title, text = document.get("title"), document.get("text")
    if not isinstance(text, str):
        if not isinstance(document.get("contents"), str):
            raise DataError("a document of the answer has neither `text` nor `contents`")
        title, text = _split_contents(document["contents"])
    metadata = document.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    if isinstance(document.get("url"), str):
        metadata = {"url": document["url"], **metadata}
    return Hit(
        Passage(str(document.get("id", "")), text, str(title or ""), metadata), float(score), generation
    )


def _split_contents(contents: str) -> tuple[str, str]:
    """Title and text: the first line, unquoted, and the others; as Search-R1 reads `contents`.

    '"Paris"\\nA city.' -> ("Paris", "A city.");   "A city." -> ("", "A city.")
    """
    first, newline, rest = contents.partition("\n")
    return (first.strip().strip('"'), rest) if newline else ("", contents)
