"""The answers that routes give, as pydantic models: for the OpenAPI page; no answer is checked by them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


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
    """A stage of a search: its backend, how many hits it gave at most, and the generation of these."""

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


class Document(BaseModel):
    """A passage, as Search-R1 and its kin read it."""

    id: str
    title: str
    text: str
    contents: str = Field(description="The quoted title and the text in one.")
    metadata: dict[str, Any] | None = None
    url: Any = Field(None, description="That of the metadata; to ASearcher the id where there is none.")
    thumbnail: str | None = None


class ScoredDocument(BaseModel):
    """A passage and its score."""

    document: Document
    score: float


class RowsReply(BaseModel):
    """Answer to Search-R1, verl, slime, SkyRL and ASearcher: one row a query."""

    result: list[list[ScoredDocument | Document]]
    generation: str


class FlatDocument(ScoredDocument):
    """A passage, its score and its id."""

    docid: str


class FlatReply(BaseModel):
    """Answer to BrowseComp-Plus, LRAT and GEM: the hits of the one query."""

    result: list[FlatDocument]
    generation: str


class RLLMResult(BaseModel):
    """A hit, as rLLM reads it."""

    id: str
    content: str
    score: float
    document: Document


class RLLMReply(BaseModel):
    """Answer to rLLM."""

    query: str
    method: str
    results: list[RLLMResult]
    num_results: int
    generation: str


class Text(BaseModel):
    """A passage, as ZeroSearch reads it."""

    text: str


RetrieveReply = RowsReply | FlatReply | RLLMReply | list[Text]


class Contents(BaseModel):
    """A passage, as ReCall reads it."""

    id: str
    contents: str


ReCallReply = list[Contents] | list[list[Contents] | list[float]]
ReCallBatchReply = list[list[Contents]] | list[list[list[Contents]] | list[list[float]]]


class Organic(BaseModel):
    """A hit, as Serper's clients read it."""

    title: str
    link: str
    snippet: str
    position: int


class SerperReply(BaseModel):
    """Answer to Serper's clients."""

    searchParameters: dict[str, str]
    organic: list[Organic]


class WebResult(BaseModel):
    """A hit, as Tavily's clients read it (`content`), or Exa's (`text`)."""

    id: str
    url: str
    title: str
    score: float
    content: str | None = None
    text: str | None = None


class WebReply(BaseModel):
    """Answer to the clients of Tavily and Exa."""

    query: str
    results: list[WebResult]


SingleSearchReply = WebReply | SerperReply | ReCallReply


class Page(BaseModel):
    """A page of the corpus."""

    contents: str


class AccessReply(BaseModel):
    """The pages asked for, in their order; null for what is not in the corpus."""

    result: list[Page | None]


class Weight(BaseModel):
    """A weight of a sparse vector."""

    index: int
    value: float


AnyVectors = list[list[float]] | list[list[Weight]] | list[list[list[float]]]


class Usage(BaseModel):
    """Tokens read; they are not counted, and told as 0."""

    prompt_tokens: int
    total_tokens: int


class Embedding(BaseModel):
    """The vector of the text at `index`."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="Numbers, or float32 in base64.")


class EmbeddingsReply(BaseModel):
    """Answer of OpenAI's `/v1/embeddings`."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class Scored(BaseModel):
    """The score of the text at `index` of a `/rerank`."""

    index: int
    score: float
    text: str | None = None


class TextOf(BaseModel):
    """The document that was scored."""

    text: str


class Relevance(BaseModel):
    """The score of the document at `index`."""

    index: int
    relevance_score: float
    document: TextOf | None = None


class RelevanceReply(BaseModel):
    """Answer of `/v1/rerank` and `/v2/rerank`: the best documents first."""

    id: str
    model: str
    results: list[Relevance]
    usage: Usage


class ScoredAnything(BaseModel):
    """A document as it was sent, and its score."""

    document: dict[str, Any]
    score: float


class RerankedRows(BaseModel):
    """Answer of Search-R1's `/rerank`: one row a query."""

    result: list[list[ScoredAnything | dict[str, Any]]]


RerankReply = list[Scored] | RelevanceReply | RerankedRows


class ModelInfo(BaseModel):
    """The model, as TEI describes it."""

    model_config = ConfigDict(protected_namespaces=())
    model_id: str
    model_type: dict[str, dict[str, Any]]
    max_input_length: int | None
    max_client_batch_size: int
    auto_truncate: bool
    version: str


class ModelReply(BaseModel):
    """A model, as OpenAI lists it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelsReply(BaseModel):
    """The models, as OpenAI lists them."""

    object: Literal["list"]
    data: list[ModelReply]


class HealthReply(BaseModel):
    """The process lives."""

    status: Literal["ok"]
    generation: str


class ReadyReply(BaseModel):
    """It takes requests; so many queries wait."""

    status: Literal["ready"]
    waiting: int


class BackendReply(BaseModel):
    """A retriever; fields beside these are its own."""

    model_config = ConfigDict(extra="allow")
    kind: str
    generation: str
    accepts: list[str]
    query_style: str | None


class InfoReply(BackendReply):
    """The default retriever, the limits of a request, and all retrievers by name."""

    limits: dict[str, float]
    backends: dict[str, BackendReply]


class SwapReply(BaseModel):
    """`swapped`: another generation answers now; generations by name of backend."""

    swapped: bool
    generations: dict[str, str]
