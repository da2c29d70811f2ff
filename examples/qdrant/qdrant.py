"""A collection of Qdrant as a retriever, dense, sparse or multi-vector; the optional extra `qdrant`.

The passage lies in a point's payload. `upload` makes such a collection; one that is there already is
searched as it is, with the names of its payload's fields as arguments.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from data.errors import ConfigError, RetrieverUnavailable
from data.machine.listening import why_silent
from data.records import Hit, Passage
from data.secret import read_secret
from retriever_server.encoders.spec import Encoder, EncodingSpec, Vectors, rows_of
from retriever_server.filters import parse_filter
from retriever_server.retriever import Filter, Query, Retriever

_POINTS_TOGETHER = 256


class Qdrant(Retriever):
    """Queries are encoded here; Qdrant searches, filters and keeps the passages."""

    encoder: Encoder

    def __init__(
        self,
        collection: str,
        encoder: str | Encoder,
        url: str | None = None,
        path: str | None = None,
        vector: str | None = None,
        key_file: str | None = None,
        title_key: str = "title",
        text_key: str = "text",
        id_key: str = "id",
        metadata_key: str = "metadata",
        deadline_seconds: float = 30.0,
        device: str = "auto",
    ) -> None:
        """`url` of a server, or `path` of a folder for the client's local mode, for some 20,000 passages.

        encoder: a sentence-transformers model, the one that encoded the passages. vector: its name in the
        collection, where that has named ones (sparse ones always have). key_file: holds the API key.
        *_key: where the payload holds what; a point without `id_key` goes by its own id.
        """
        from qdrant_client import QdrantClient

        if (url is None) == (path is None):
            raise ConfigError(f"url = {url}, path = {path}: must be one of the two")
        if url and (reason := why_silent(url)):  # before the encoder is loaded
            raise RetrieverUnavailable(f"Qdrant at {url}, {collection}: {reason}")
        self.encoder, self.collection, self.waits = _load(encoder, device), collection, url is not None
        self._vector, self._metadata_key = vector, metadata_key
        self._keys = {"id": id_key, "title": title_key, "text": text_key}
        key = None if key_file is None else read_secret(key_file, "key_file")
        self._where = url or path
        self._client = QdrantClient(
            url=url, path=path, api_key=key, timeout=max(1, round(deadline_seconds)),
            check_compatibility=False, force_disable_check_same_thread=True,
        )  # fmt: skip
        self._local = threading.Lock() if path is not None else None
        self.generation = self._count()

    def search(self, queries: Sequence[Query], k: int, where: Filter | None = None) -> list[list[Hit]]:
        """The `k` nearest points of each query; raises RetrieverUnavailable where Qdrant does not answer."""
        from qdrant_client import models

        if k < 1:
            raise ConfigError(f"k = {k}: must be >= 1")
        if not queries:
            return []
        allowed = _condition(where, self._metadata_key) if where else None
        asked = _points(self.encoder.encode(queries, "query"))
        requests = [
            models.QueryRequest(query=query, using=self._vector, limit=k, filter=allowed, with_payload=True)
            for query in asked
        ]
        with self._answering():
            answers = self._client.query_batch_points(self.collection, requests)
        return [[self._hit(point) for point in answer.points] for answer in answers]

    def upload(self, passages: Iterable[Passage]) -> None:
        """Encode passages and put them into the collection, which is made if it is not there."""
        from qdrant_client import models

        with self._answering():
            if not self._client.collection_exists(self.collection):
                self._client.create_collection(self.collection, **_layout(self.encoder.spec, self._vector))
        for together in _in_parts(passages, _POINTS_TOGETHER):
            vectors = _points(self.encoder.encode([self.encoder.spec.render(p) for p in together], "passage"))
            points = [
                models.PointStruct(
                    id=str(uuid.uuid5(uuid.NAMESPACE_OID, passage.id)),
                    vector={self._vector: vector} if self._vector else vector,
                    payload=self._payload(passage),
                )
                for passage, vector in zip(together, vectors, strict=True)
            ]
            with self._answering():
                self._client.upsert(self.collection, points, wait=True)
        self.generation = self._count()

    def _count(self) -> str:
        """Names what answers, as far as Qdrant tells. One that others change keeps it till opened."""
        with self._answering():
            there = self._client.collection_exists(self.collection)
            count = self._client.count(self.collection).count if there else 0
        return f"qdrant({self.collection}: {count} points, {self.encoder.spec.hash})"

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """One at a time in local mode; what the client raises as an error of ours."""
        from qdrant_client.http.exceptions import ApiException

        try:
            if self._local is None:
                yield
            else:
                with self._local:
                    yield
        except (ApiException, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RetrieverUnavailable(f"Qdrant at {self._where}, {self.collection}: {reason}") from error

    def _payload(self, passage: Passage) -> dict[str, Any]:
        of = {"id": passage.id, "title": passage.title, "text": passage.text}
        payload: dict[str, Any] = {self._keys[name]: value for name, value in of.items()}
        return {**payload, self._metadata_key: dict(passage.metadata)}

    def _hit(self, point: Any) -> Hit:
        payload = point.payload or {}
        of = {name: payload.get(key) for name, key in self._keys.items()}
        metadata = payload.get(self._metadata_key)
        metadata = metadata if isinstance(metadata, dict) else {}
        passage_id = str(point.id if of["id"] is None else of["id"])
        passage = Passage(passage_id, str(of["text"] or ""), str(of["title"] or ""), metadata)
        return Hit(passage, float(point.score), self.generation)

    def close(self) -> None:
        """Close the connection, or the folder: only one may have it open."""
        self._client.close()


def _load(encoder: str | Encoder, device: str) -> Encoder:
    if isinstance(encoder, Encoder):
        return encoder
    from retriever_server.encoders.loading import load_encoder

    return load_encoder(encoder, device=device)


def _points(vectors: Vectors) -> list[Any]:
    """Each text's vector as Qdrant takes it."""
    from qdrant_client import models

    if hasattr(vectors, "tocsr"):  # a sparse matrix
        rows = (vectors[[i]].tocoo() for i in range(vectors.shape[0]))
        return [models.SparseVector(indices=row.coords[1].tolist(), values=row.data.tolist()) for row in rows]
    if hasattr(vectors, "offsets"):
        return [rows_of(vectors, i).tolist() for i in range(len(vectors))]
    return vectors.tolist()


def _layout(spec: EncodingSpec, name: str | None) -> dict[str, Any]:
    """Return the settings of a collection that holds the vectors of an encoder."""
    from qdrant_client import models

    if spec.kind == "sparse":
        if name is None:
            raise ConfigError("vector: sparse vectors need a name in the collection")
        return {"vectors_config": {}, "sparse_vectors_config": {name: models.SparseVectorParams()}}
    distance = models.Distance.COSINE if spec.similarity == "cosine" else models.Distance.DOT
    max_sim = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    several = max_sim if spec.kind == "multi" else None
    params = models.VectorParams(size=spec.dimension, distance=distance, multivector_config=several)
    return {"vectors_config": {name: params} if name else params}


def _condition(where: Filter, under: str) -> Any:
    """Our filter as Qdrant's; ConfigError for bounds on strings, which it does not know."""
    from qdrant_client import models

    parse_filter(where)
    conditions = []
    for name, wanted in where.items():
        key = f"{under}.{name}"
        if isinstance(wanted, dict) and "in" not in wanted:
            if not all(isinstance(bound, int | float) for bound in wanted.values()):
                raise ConfigError(f"filter on {name!r}: Qdrant has bounds for numbers, got {wanted}")
            conditions.append(models.FieldCondition(key=key, range=models.Range(**wanted)))
        else:
            values = wanted["in"] if isinstance(wanted, dict) else [wanted]
            conditions.append(models.Filter(should=[_equals(key, value) for value in values]))
    return models.Filter(must=conditions)


def _equals(key: str, value: Any) -> Any:
    from qdrant_client import models

    if value is None:
        return models.IsNullCondition(is_null=models.PayloadField(key=key))
    if isinstance(value, float):
        return models.FieldCondition(key=key, range=models.Range(gte=value, lte=value))
    return models.FieldCondition(key=key, match=models.MatchValue(value=value))


def _in_parts(items: Iterable[Passage], size: int) -> Iterator[Sequence[Passage]]:
    part: list[Passage] = []
    for item in items:
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
