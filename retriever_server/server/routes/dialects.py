"""How other projects' clients ask for passages and how each wants them back.

    Search-R1, verl, slime  {"queries", "topk", "return_scores"}  {"result": [[{"document", "score"}]]}
    SkyRL                   {"query", "topk", "return_scores"}    the same, one row
    rLLM                    {"query", "top_k"} (and "k")          {"query", "results", "num_results"}
    ZeroSearch              {"query", "top_k"}                    [{"text"}]
    ASearcher               as Search-R1, without scores          documents that have a "url"
    ReCall                  {"query", "top_n", "return_score"}    [{"id", "contents"}] or [those, scores]
    Serper's clients        {"q", "num"}                          {"organic": [{"title", "link", "snippet"}]}

What two of them ask alike is answered as `dialect` says. Any of them may name a filter `where`, a `backend`
and `deadline_seconds`, as `/v1/search` has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data.errors import DataError
from data.records import Hit
from retriever_server.client.wire import render_document, render_hits
from retriever_server.server.schema import BatchSearchBody, RetrieveBody, SingleSearchBody

DIALECTS = ("rllm", "zerosearch", "search-r1", "skyrl", "asearcher")
_TOP_K_NAMES = ("topk", "topk_rerank", "top_k", "k", "top_n")


@dataclass(frozen=True)
class Asked:
    """What a client of any dialect asks."""

    queries: list[str]
    top_k: int | None
    shape: str
    """Key of SHAPES."""
    return_scores: bool = False
    backend: str | None = None
    """That of the links to pictures, where it is not the default."""


Rankings = list[list[Hit]]
Shape = Callable[[Asked, Rankings, str], Any]


def asked_of_retrieve(body: RetrieveBody, dialect: str) -> Asked:
    """What `POST /retrieve` asks, and the shape of its answer."""
    top_k = next((value for name in _TOP_K_NAMES if (value := getattr(body, name)) is not None), None)
    scored = bool(body.return_scores or body.return_score)
    if body.queries is not None:
        return Asked(body.queries, top_k, "asearcher" if dialect == "asearcher" else "rows", scored)
    if body.query is None:
        raise DataError("queries: must be a list of strings (or query a string)")
    if body.topk is not None or dialect not in ("rllm", "zerosearch"):
        return Asked([body.query], top_k, "rows", scored)
    both = body.top_k is not None and body.k is not None
    return Asked([body.query], top_k, "rllm" if both else dialect)


def asked_of_search(body: SingleSearchBody) -> Asked:
    """What `POST /search` asks: of ReCall by `query`, of Serper by `q`."""
    if body.query is not None:
        return Asked([body.query], body.top_n, "recall", body.return_score)
    if body.q is None:
        raise DataError("query: must be a string")
    return Asked([body.q], body.num, "serper")


def asked_of_batch_search(body: BatchSearchBody) -> Asked:
    """What `POST /batch_search` of ReCall asks."""
    return Asked(body.query, body.top_n, "recall-batch", body.return_score)


def url_of(hit: Hit) -> str:
    """Where `/access` finds the passage: its own url if its metadata has one, else its id."""
    return str(hit.passage.metadata.get("url") or hit.passage.id)


def _rows(asked: Asked, rankings: Rankings, generation: str) -> Any:
    return render_hits(rankings, generation, asked.return_scores, asked.backend)


def _asearcher(asked: Asked, rankings: Rankings, generation: str) -> Any:
    answer = render_hits(rankings, generation, asked.return_scores, asked.backend)
    for row, hits in zip(answer["result"], rankings, strict=True):
        for item, hit in zip(row, hits, strict=True):
            item.get("document", item)["url"] = url_of(hit)
    return answer


def _rllm(asked: Asked, rankings: Rankings, generation: str) -> Any:
    results = [
        {
            "id": hit.passage.id,
            "content": hit.passage.given_contents,
            "score": hit.score,
            "document": render_document(hit, asked.backend),  # where its own tool looks
        }
        for hit in rankings[0]
    ]
    named = {"query": asked.queries[0], "method": generation}
    return {**named, "results": results, "num_results": len(results), "generation": generation}


def _zerosearch(asked: Asked, rankings: Rankings, generation: str) -> Any:
    return [{"text": hit.passage.given_contents} for hit in rankings[0]]


def _recall(asked: Asked, rankings: Rankings, generation: str) -> Any:
    documents = [
        [{"id": hit.passage.id, "contents": hit.passage.given_contents} for hit in row] for row in rankings
    ]
    scores = [[hit.score for hit in row] for row in rankings]
    if asked.shape == "recall":
        return [documents[0], scores[0]] if asked.return_scores else documents[0]
    return [documents, scores] if asked.return_scores else documents


def _serper(asked: Asked, rankings: Rankings, generation: str) -> Any:
    organic = [
        {"title": hit.passage.title, "link": url_of(hit), "snippet": hit.passage.text, "position": rank}
        for rank, hit in enumerate(rankings[0], start=1)
    ]
    return {"searchParameters": {"q": asked.queries[0]}, "organic": organic}


SHAPES: dict[str, Shape] = {
    "rows": _rows,
    "asearcher": _asearcher,
    "rllm": _rllm,
    "zerosearch": _zerosearch,
    "recall": _recall,
    "recall-batch": _recall,
    "serper": _serper,
}
