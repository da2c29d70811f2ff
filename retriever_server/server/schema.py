"""The requests that routes take, as pydantic models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, RootModel, Tag

from data.errors import DataError
from data.text import is_unicode


class Body(BaseModel):
    """A JSON object; fields that it does not know are passed over, as every client's own are."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Stage(Body):
    """One stage of a search: `retrieve` comes first, once; each `rerank` orders what the one before gave."""

    model_config = ConfigDict(extra="forbid")
    retrieve: str | None = Field(default=None, description="The backend that finds, by its name in /v1/info.")
    rerank: str | None = Field(default=None, description="The backend whose reranker orders anew.")
    k: int | None = Field(default=None, description="Hits that it gives; null: what the next looks at.")


class ImageInput(Body):
    """An image, a text, or both: a query of /v1/search, an input of /embed."""

    model_config = ConfigDict(extra="forbid")
    image: str | None = Field(
        None, description="A PNG, JPEG, WebP, GIF, BMP or TIFF file in base64, or as data: URL; no other URL."
    )
    text: str = Field("", description="What is said with the image, or alone.")


def _kind(value: Any) -> str:
    return "Item" if isinstance(value, dict | ImageInput) else "Text"


def _kind_or_ids(value: Any) -> str:
    return "Ids" if isinstance(value, list) else _kind(value)


def _kind_or_list(value: Any) -> str:
    is_list = isinstance(value, list) and not (value and isinstance(value[0], int))
    return "List" if is_list else _kind_or_ids(value)


TextOrImage = Annotated[
    Annotated[str, Tag("Text")] | Annotated[ImageInput, Tag("Item")],
    Discriminator(_kind),
]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
"""A text as the tokens of the encoder's own tokenizer."""
_OneInput = Annotated[
    Annotated[str, Tag("Text")] | Annotated[ImageInput, Tag("Item")] | Annotated[TokenIds, Tag("Ids")],
    Discriminator(_kind_or_ids),
]
OneOrMore = Annotated[
    Annotated[str, Tag("Text")]
    | Annotated[ImageInput, Tag("Item")]
    | Annotated[TokenIds, Tag("Ids")]
    | Annotated[list[_OneInput], Field(min_length=1), Tag("List")],
    Discriminator(_kind_or_list),
]


class SearchOptions(Body):
    """Options of any search: out of which passages, by whom, within which time."""

    where: dict[str, Any] | None = Field(
        None, description='Filter on metadata: {"f": v}, {"f": {"in": [v]}}, {"f": {"gte": a, "lt": b}}.'
    )
    backend: str | None = Field(None, description="Which retriever, by its name in /v1/info.")
    deadline_seconds: float | None = Field(
        None, gt=0, description="Answer 504 if it takes longer; the header X-Deadline-Seconds says the same."
    )


class OwnSearch(SearchOptions):
    """Options of `POST /v1/search` alone."""

    model_config = ConfigDict(extra="forbid")  # our own route: a misspelt `top_k` is no default
    top_k: int | None = Field(None, description="Passages a query; null: the server's default.")
    stages: list[Stage] | None = Field(
        None, min_length=1, max_length=4, description="Instead of backend: who finds, and who orders it anew."
    )


class SearchBody(OwnSearch):
    """A request of `POST /v1/search` in JSON."""

    model_config = ConfigDict(
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


class SearchForm(OwnSearch):
    """A request of `POST /v1/search` as a form with files; other fields than these are JSON."""

    image: list[bytes] = Field([], description="Files, each a query.")
    text: str = Field("", description="A query, or what is said with each image.")


class RetrieveBody(SearchOptions):
    """A request of `POST /retrieve` in any dialect: one of `queries` and `query`, one name of top k."""

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


class PackedBody(RetrieveBody):
    """The same in MessagePack, as GEM sends it."""


class SingleSearchBody(SearchOptions):
    """`POST /search`: Tavily's (`query`), ReCall's (`top_n`), Exa's (`contents`), Serper's (`q`)."""

    query: str | None = None
    q: str | None = None
    top_n: int | None = None
    num: int | None = None
    return_score: bool | None = None
    max_results: int | None = None
    contents: dict[str, Any] | bool | None = None
    numResults: int | None = None


class BatchSearchBody(SearchOptions):
    """`POST /batch_search` of ReCall."""

    query: list[str]
    top_n: int | None = None
    return_score: bool = False


class PassagesBody(Body):
    """A change of the passages of an index: `POST /admin/passages`."""

    model_config = ConfigDict(extra="forbid")
    add: list[dict[str, Any]] | None = Field(None, min_length=1, description="Passages as a corpus has them.")
    delete: list[str | int] | None = Field(None, min_length=1, description="Ids; not in the same request.")
    replace: bool = Field(False, description="Added passages take the place of those with their ids.")
    backend: str | None = Field(None, description="Which index, by its name in /v1/info.")


class AccessBody(Body):
    """`POST /access` of ASearcher: pages of the corpus, by their id or url."""

    urls: list[str]
    whole: bool = Field(False, description="Of an id: the whole document that the passage is from.")


class Truncated(Body):
    """TEI's options for texts that are longer than the model reads."""

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
    texts: list[str] | None = None
    raw_scores: bool = False
    return_text: bool = False
    queries: list[str] | None = None
    documents: list[list[dict[str, Any]]] = []
    rerank_topk: int | None = Field(None, ge=1)
    return_scores: bool = False


class TextDocument(Body):
    """A text to score."""

    text: str


class DocumentsBody(Body):
    """`/v1/rerank`, `/v2/rerank` and, by its keys, `/rerank` of Cohere, Jina and vLLM."""

    query: str
    documents: str | list[str | TextDocument]
    top_n: int | None = Field(None, ge=0, description="0: all of them, as vLLM has it.")
    model: str | None = None
    return_documents: bool = True


def _asker(value: Any) -> str:
    keys = value.keys() if isinstance(value, dict) else ()
    return "Documents" if "documents" in keys and "queries" not in keys else "Texts"


class AnyRerankBody(RootModel):
    """`/rerank`: of TEI and Search-R1, or of Cohere, Jina and vLLM (`query` and `documents`)."""

    root: Annotated[
        Annotated[RerankBody, Tag("Texts")] | Annotated[DocumentsBody, Tag("Documents")],
        Discriminator(_asker),
    ]


class AnyInputs(Body):
    """TEI's `POST /`: the body of its `/embed` or `/rerank`."""

    model_config = ConfigDict(extra="allow")


class EmbeddingsBody(Body):
    """OpenAI's `/v1/embeddings`; `is_query` as PyLate sends it."""

    input: OneOrMore
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    is_query: bool = False


def texts_of(inputs: Sequence[str | ImageInput]) -> list[str]:
    """Return the text of each; "" of an image that came alone."""
    return [each if isinstance(each, str) else each.text for each in inputs]


NO_UNICODE = "not Unicode: half a surrogate pair"


def check_unicode(texts: Sequence[str]) -> None:
    """Raise DataError if one holds half a surrogate pair, which JSON can carry and no encoder reads."""
    if not all(map(is_unicode, texts)):
        raise DataError(NO_UNICODE)
