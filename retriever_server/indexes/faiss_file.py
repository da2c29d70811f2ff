"""A flat faiss index and its corpus, as Search-R1 publishes them, searched as they are."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from data.atomic import stamp_of
from data.corpus import Corpus
from data.errors import CorpusChanged, DataError
from data.machine.device import resolve_device
from retriever_server.encoders.spec import Encoder, Vectors
from retriever_server.indexes.base import Ranking
from retriever_server.indexes.checksums import sample_hash
from retriever_server.indexes.encoded import VectorSearch, check_encodes
from retriever_server.indexes.vector_store import Rows


class FaissFile(VectorSearch):
    """Exact search of the vectors in a faiss Flat file; row i is passage i of the corpus.

    index: such as `e5_Flat.index`, memory-mapped. corpus: such as `wiki-18.jsonl`. encoder: a model's name
    with these prompts (E5's by default), or one that is loaded.
    """

    def __init__(
        self,
        index: str,
        corpus: str,
        encoder: str | Encoder,
        query_prompt: str = "query: ",
        passage_prompt: str = "passage: ",
        device: str = "auto",
        recheck: int = 4,
    ) -> None:
        """recheck: so many passages are encoded again and compared (cosine > .999) with their rows.

        Raises DataError if index, corpus and encoder do not belong together.
        """
        from retriever_server.encoders.loading import load_encoder

        if isinstance(encoder, str):
            template = "{contents}"  # what Search-R1 encodes: the quoted title, a newline, the text
            encoder = load_encoder(encoder, None, query_prompt, passage_prompt, template, device=device)
        self.corpus, self.encoder, path = Corpus(corpus), encoder, Path(index)
        self._index, vectors = _flat_vectors(path)  # the index owns the memory of its vectors
        self._path, self._status = path, stamp_of(path)
        if len(vectors) != len(self.corpus):
            raise DataError(f"{path}: {len(vectors)} vectors, but {corpus} has {len(self.corpus)} passages")
        if vectors.shape[1] != encoder.spec.dimension:
            made = f"{encoder.spec.model} makes {encoder.spec.dimension}"
            raise DataError(f"{path}: vectors of {vectors.shape[1]} dimensions, {made}")
        self.rows = Rows.of(vectors, resolve_device(device))
        count = min(recheck, len(vectors))
        positions = [len(vectors) * i // count for i in range(count)]
        check_encodes(encoder, self.corpus, positions, lambda i: self.rows[np.array([i])], path)
        made_of = f"{sample_hash(path)} {self.corpus.content_hash} {encoder.spec.hash}"
        self.generation = f"faiss-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"

    def rank(self, queries: Vectors, k: int, mask: np.ndarray | None = None) -> list[Ranking]:
        """As `VectorSearch.rank`, exactly."""
        self._check_not_rewritten()
        return self.rows.search(queries, k, mask)

    def _check_not_rewritten(self) -> None:
        """Raise CorpusChanged where the very file that is mapped is another now; to read on may kill us."""
        if not self._path.is_file():
            return  # removed: what is mapped stays
        (file, *was), (same, *now) = self._status, stamp_of(self._path)
        if file == same and was != now:
            raise CorpusChanged(f"{self._path.name}: rewritten since it was opened; open it again")


def _flat_vectors(path: Path) -> tuple[Any, np.ndarray]:
    """Return a faiss IndexFlat of inner products, and its vectors, mapped.   (P, D)"""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise DataError(f"{path}: no index of faiss ({str(error).splitlines()[-1]})") from error
    if not isinstance(index, faiss.IndexFlat) or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        found = f"{type(index).__name__}, metric {index.metric_type}"
        raise DataError(f"{path}: {found}; must be a Flat index of inner products (else `sleuth index`)")
    vectors = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d)
    return index, vectors.reshape(index.ntotal, index.d)
