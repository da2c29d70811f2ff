"""MTEB on what Sleuth has: a `Retriever` by its search protocol, an encoder by its encoder protocol.

    mteb.evaluate(MTEBRetriever(lambda corpus: BM25Index.build(corpus, folder), "bm25"), tasks)
    mteb.evaluate(MTEBEncoder("OUT/model"), tasks)

Needs `pip install 'sleuth-rl[mteb]'` (MTEB 2). Retrieval and reranking tasks of text go through the first,
whatever searches; the second is for dense vectors and runs the tasks without a search, too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import Corpus
from data.errors import ConfigError, DataError
from data.jsonl import write_jsonl
from data.records import Passage, Question
from retriever_server.encoders.spec import Encoder
from retriever_server.evaluation import rank_all
from retriever_server.retriever import Retriever


class MTEBRetriever:
    """MTEB's SearchProtocol: a retriever is made for the corpus of each task and answers its queries."""

    def __init__(self, make: Callable[[Corpus], Retriever], name: str) -> None:
        """`make` gets the corpus of a task, in a folder that goes with the next one; `name`: for the table.

        The passages carry {"id"} as metadata: tasks that name the candidates of a query filter by it.
        """
        self._make, self._name = make, name
        self._retriever: Retriever | None = None
        self._folder: tempfile.TemporaryDirectory | None = None

    def index(self, corpus: Iterable[Mapping[str, Any]], **_: Any) -> None:
        """Write the corpus as ours and make a retriever for it."""
        self.close()
        self._folder = tempfile.TemporaryDirectory(prefix="sleuth-mteb-")
        path = Path(self._folder.name) / "corpus.jsonl"
        write_jsonl(path, (_row(document) for document in corpus))
        self._retriever = self._make(Corpus(path))

    def search(
        self,
        queries: Iterable[Mapping[str, Any]],
        *,
        top_k: int,
        top_ranked: Mapping[str, list[str]] | None = None,
        **_: Any,
    ) -> dict[str, dict[str, float]]:
        """Query id -> passage id -> score, of the best `top_k`, or of the best of its candidates."""
        if self._retriever is None:
            raise ConfigError("search before index: MTEB gives the corpus first")
        asked = [Question(str(query["id"]), _query_text(query), ()) for query in queries]
        parts: list[tuple[list[Question], Any]] = [(asked, None)]
        if top_ranked is not None:
            parts = [([each], {"id": {"in": list(map(str, top_ranked[each.id]))}}) for each in asked]
        found = [rank_all(self._retriever, part, top_k, where=where).items() for part, where in parts]
        return {id_: {hit.passage.id: hit.score for hit in hits} for each in found for id_, hits in each}

    @property
    def mteb_model_meta(self) -> Any:
        """Its entry in MTEB's tables."""
        return _meta(self._name, None)

    def close(self) -> None:
        """Close the retriever of the last task, and let its corpus go."""
        if self._retriever is not None:
            self._retriever.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._retriever = self._folder = None


class MTEBEncoder:
    """MTEB's EncoderProtocol: a dense encoder with the prompts of its spec, whatever the task.

    Passages are rendered by the spec's template, so that MTEB judges the vectors that an index would hold.
    Tasks without queries and passages (similarity, classification) are encoded as queries.
    """

    def __init__(
        self,
        model_name: str | Encoder,
        revision: str | None = None,
        *,
        device: str | None = None,
        **options: Any,
    ) -> None:
        """`model_name`: an encoder, or what `load_encoder` takes, as it takes `options`."""
        if revision is not None:
            raise ConfigError(f"revision {revision!r}: give the folder of that revision as the model")
        self.encoder: Encoder
        if isinstance(model_name, Encoder):
            self.encoder = model_name
        else:
            from retriever_server.encoders.loading import load_encoder

            self.encoder = load_encoder(model_name, device=device or "auto", **options)
        if self.encoder.spec.kind != "dense":
            raise ConfigError(
                f"encoder {self.encoder.spec.model}: makes {self.encoder.spec.kind} vectors; "
                "index it and give MTEB the retriever (MTEBRetriever)"
            )

    def encode(self, inputs: Iterable[Mapping[str, Any]], *, prompt_type: Any = None, **_: Any) -> np.ndarray:
        """Return the vectors of all batches of texts.   -> (N, D) float32"""
        passages = getattr(prompt_type, "value", prompt_type) == "document"
        texts: list[str] = []
        for batch in inputs:
            if "text" not in batch:
                raise ConfigError("a batch without text: only text is encoded")
            texts += self._rendered(batch) if passages else batch["text"]
        return self.encoder.encode(texts, "passage" if passages else "query")

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Return all scores of one set with the other, as the spec says.   (N, D), (M, D) -> torch (N, M)"""
        return self._finished(embeddings1) @ self._finished(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Return the scores of the pairs.   (N, D), (N, D) -> torch (N,)"""
        return (self._finished(embeddings1) * self._finished(embeddings2)).sum(-1)

    @property
    def mteb_model_meta(self) -> Any:
        """Its entry in MTEB's tables."""
        return _meta(Path(self.encoder.spec.model).name, self.encoder)

    def _rendered(self, batch: Mapping[str, Any]) -> list[str]:
        bodies = batch.get("body") or batch["text"]
        titles = batch.get("title") or [""] * len(bodies)
        render = self.encoder.spec.render_text
        return [
            render(Passage("", body.strip(), (title or "").strip()))
            for title, body in zip(titles, bodies, strict=True)
        ]

    def _finished(self, vectors: Any) -> Any:
        import torch

        vectors = np.atleast_2d(np.asarray(vectors, np.float32))
        if self.encoder.spec.similarity == "cosine":
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return torch.from_numpy(vectors)


def _row(document: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a document of MTEB's into a passage; one without any text keeps its place by a full stop."""
    id_, title = str(document["id"]), (document.get("title") or "").strip()
    text = (document.get("text") or "").strip()
    if not text:
        title, text = "", title or "."
    return {"id": id_, "title": title, "text": text, "metadata": {"id": id_}}


def _query_text(query: Mapping[str, Any]) -> str:
    """Text and instruction, put together as MTEB does it."""
    text = query.get("text")
    if not isinstance(text, str):
        raise DataError(f"query {query.get('id')!r}: only texts are searched")
    instruction = query.get("instruction")
    return f"{text} {instruction}" if instruction else text


def _meta(name: str, encoder: Encoder | None) -> Any:
    from mteb.models.model_meta import ModelMeta, ScoringFunction

    known: dict[str, Any] = {"name": f"sleuth/{name}", "revision": "none"}
    if encoder is not None:
        spec = encoder.spec
        scoring = ScoringFunction.COSINE if spec.similarity == "cosine" else ScoringFunction.DOT_PRODUCT
        known |= {"revision": spec.fingerprint, "embed_dim": spec.dimension, "max_tokens": spec.max_tokens}
        known |= {"similarity_fn_name": scoring, "use_instructions": bool(spec.query_prompt)}
    return ModelMeta.create_empty(overwrites=known)
