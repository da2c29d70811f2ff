"""Encoders for tests: a fake of each kind that needs no model, and tiny real ones from a config."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

from retriever_server.encoders.spec import Encoder, EncodingSpec, Multi, Role, Vectors

_TEXT = "the a of river red blue fox sea city capital is in north big small old two one not always"
WORDS = _TEXT.split()


class FakeEncoder(Encoder):
    """Every word has a fixed random vector: a text is their mean (dense), their counts, or their list."""

    def __init__(self, kind: str = "dense", dimension: int = 16, seed: int = 0) -> None:
        similarity = {"dense": "cosine", "sparse": "dot", "multi": "maxsim"}[kind]
        self.spec = EncodingSpec("fake", kind, f"seed {seed}", dimension, similarity=similarity)
        self.seed, self.encoded = seed, 0
        self._known: dict[str, np.ndarray] = {}

    def encode(self, texts: list[str], role: Role) -> Vectors:
        self.encoded += len(texts)
        words = [text.split() or ["none"] for text in texts]
        if self.spec.kind == "sparse":
            return csr_array(np.stack([self._counts(each) for each in words]))
        rows = [np.stack([self._vector(word) for word in each]) for each in words]
        if self.spec.kind == "multi":
            return Multi(np.concatenate(rows), np.cumsum([0, *map(len, rows)], dtype=np.int64))
        means = np.stack([row.mean(0) for row in rows])
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    def _vector(self, word: str) -> np.ndarray:
        if word not in self._known:
            rng = np.random.default_rng(zlib.crc32(word.encode()) + self.seed)
            vector = rng.standard_normal(self.spec.dimension).astype(np.float32)
            self._known[word] = vector / np.linalg.norm(vector)
        return self._known[word]

    def _counts(self, words: list[str]) -> np.ndarray:
        counts = np.zeros(self.spec.dimension, np.float32)
        for word in words:
            counts[zlib.crc32(word.encode()) % self.spec.dimension] += 0.7
        return counts


def tiny_model(folder: Path, kind: str, positions: int = 64) -> str:
    """A saved sentence-transformers model of this kind: two layers of 32, a vocabulary of characters.

    kind: dense, sparse or multi; cross is a cross-encoder.
    """
    import sentence_transformers as st
    import torch
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from sentence_transformers.sentence_transformer.modules import Pooling
    from sentence_transformers.sparse_encoder.modules import SpladePooling
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        BertForSequenceClassification,
        BertModel,
        BertTokenizerFast,
    )

    torch.manual_seed(0)
    pieces = [*"abcdefghijklmnopqrstuvwxyz.:,", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *(w for w in WORDS if len(w) > 1)]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=positions, initializer_range=0.5, num_labels=1,
    )  # fmt: skip
    of = {"sparse": BertForMaskedLM, "cross": BertForSequenceClassification}.get(kind, BertModel)
    of(config).save_pretrained(folder)
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    if kind == "cross":
        return str(folder)
    prompts = {"query": "query: ", "document": "passage: "}
    name = str(folder)
    if kind == "dense":
        modules = [Transformer(name), Pooling(32, pooling_mode="mean"), Normalize()]
        model = st.SentenceTransformer(modules=modules, prompts=prompts, device="cpu")
    elif kind == "sparse":
        modules = [Transformer(name, transformer_task="fill-mask"), SpladePooling("max")]
        model = st.SparseEncoder(modules=modules, prompts=prompts, device="cpu")
    else:
        project = Dense(32, 16, bias=False, module_input_name="token_embeddings", activation_function=None)
        modules = [Transformer(name), project, MultiVectorMask(), Normalize("token_embeddings")]
        model = st.MultiVectorEncoder(modules=modules, prompts=prompts, device="cpu")
    model.save(str(folder / "model"))
    return str(folder / "model")
