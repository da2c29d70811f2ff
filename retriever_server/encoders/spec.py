"""An encoder: its kind, the spec that holds everything which decides its vectors, and the vectors.

Three representations of texts, by kind: dense, float32 (N, D); sparse, a scipy csr_array (N, V) of weights
>= 0; multi, `Multi`, a vector a token.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, Literal

import numpy as np

from data.errors import ConfigError, DataError
from data.pages.modalities import kinds
from data.records import Input, Item, Passage

Role = Literal["query", "passage"]
Vectors = Any
"""np.ndarray | scipy.sparse.csr_array | Multi"""


@dataclass(frozen=True)
class Kind:
    """Names of the parts of one kind of model in sentence-transformers and in our indexes."""

    name: str
    class_name: str
    """Class of its model in sentence-transformers."""
    index: str
    """Kind of the exact index that searches its vectors; "": it makes none, but reads pairs."""
    losses: str
    """Module of sentence-transformers with the losses for it."""

    @cached_property
    def model_class(self) -> Any:
        """Its class in sentence-transformers."""
        return getattr(import_module("sentence_transformers"), self.class_name)

    @cached_property
    def trainer_class(self) -> Any:
        """Its trainer in sentence-transformers; `training_args_class` is that of its arguments."""
        return getattr(import_module("sentence_transformers"), f"{self.class_name}Trainer")


_ST = "sentence_transformers"
DENSE = Kind("dense", "SentenceTransformer", "flat", f"{_ST}.sentence_transformer.losses")
SPARSE = Kind("sparse", "SparseEncoder", "inverted", f"{_ST}.sparse_encoder.losses")
MULTI = Kind("multi", "MultiVectorEncoder", "maxsim", f"{_ST}.multi_vector_encoder.losses")
CROSS = Kind("cross", "CrossEncoder", "", f"{_ST}.cross_encoder.losses")
KINDS = {kind.name: kind for kind in (DENSE, SPARSE, MULTI, CROSS)}
ENCODERS = {name: kind for name, kind in KINDS.items() if kind.index}
"""Kinds that make vectors."""


def kind_of_model(model: Any) -> Kind:
    """The kind of a model of sentence-transformers."""
    names = [each.__name__ for each in type(model).__mro__]
    return next(kind for kind in KINDS.values() if kind.class_name in names)


@dataclass(frozen=True)
class EncodingSpec:
    """Everything that silently ruins vectors when it is wrong. JSON, hashed into every index."""

    model: str
    """Name or folder it was loaded from; not part of the hash: the fingerprint says which weights."""
    kind: str
    """dense, sparse or multi."""
    fingerprint: str
    """Short hash of the weights, the same in fp32 and bf16."""
    dimension: int
    """Size of a vector; sparse: of the vocabulary."""
    query_prompt: str = ""
    passage_prompt: str = ""
    """Put before the text, and where the model says so left out of the pooling."""
    passage_template: str = "{title}\n{text}"
    """The text of a passage; may name {title}, {text}, {contents}, {expansion} (of its metadata)."""
    max_tokens: int | None = None
    pooling: str = ""
    normalise: bool = False
    """Scale vectors to length 1, whatever the model leaves."""
    similarity: str = "dot"
    """cosine (of vectors of length 1), dot or maxsim."""
    inputs: str = "text"
    """Part of a passage that is encoded: text, image, or text+image (what it has of both); or audio"""
    image_processor: str = ""
    """Processing of an image before the model sees it: processor, pixels, patches, tokens."""
    token_pooling: str = ""
    """Pooling of the token vectors of a passage before they are stored, such as rows:4; "" not at all."""
    query_style: str = "query"
    """Text that agents ask it in, as it was trained (`agent.query_styles`); "query": the query alone."""

    def __post_init__(self) -> None:
        if self.kind not in ENCODERS:
            raise ConfigError(f"encoder kind {self.kind!r}: must be one of {', '.join(ENCODERS)}")
        if self.inputs not in kinds():
            known = f"must be one of {', '.join(kinds())} (data.pages.modalities registers more)"
            raise ConfigError(f"encoder inputs {self.inputs!r}: {known}")
        try:
            self.render_text(Passage("", "text", "title"))
        except (KeyError, IndexError, ValueError) as error:
            allowed = "may name {title}, {text}, {contents} and {expansion}"
            raise ConfigError(f"passage_template {self.passage_template!r}: {allowed}") from error

    @property
    def hash(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of all fields that decide vectors."""
        later = {"inputs": "text", "image_processor": "", "token_pooling": "", "query_style": "query"}
        # Younger fields are hashed where they say more, so that older specs keep their hash.
        fields = {key: value for key, value in asdict(self).items() if later.get(key) != value}
        del fields["model"]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    def render(self, passage: Passage) -> Input:
        """Return what of a passage is encoded, without the prompt. DataError if it has nothing of that."""
        if self.inputs == "text":
            return self.render_text(passage)
        modality = self.inputs.removeprefix("text+")
        file, alone = passage.files.get(modality), modality == self.inputs
        if alone and not file:
            only = f"and {self.model} encodes nothing else"
            raise DataError(f"passage {passage.id!r} has no {modality}, {only}")
        text = "" if alone else self.render_text(passage)
        return Item(file, text, modality) if file else text

    def render_text(self, passage: Passage) -> str:
        """The text of a passage that is encoded."""
        fields = {"title": passage.title, "text": passage.text}
        if "{contents" in self.passage_template:
            fields["contents"] = passage.contents
        expansion = str(passage.metadata.get("expansion", ""))
        return self.passage_template.format(**fields, expansion=expansion).strip()

    def differences(self, other: EncodingSpec, but: Collection[str] = ()) -> str:
        """List the fields of the hash that differ, for a message.   -> "pooling: cls, here mean" """
        here, there = asdict(self), asdict(other)
        odd = [key for key in here if key not in ("model", *but) and here[key] != there[key]]
        return "; ".join(f"{key}: {there[key]!r}, here {here[key]!r}" for key in odd)


class Encoder(ABC):
    """Texts, and what holds images, in; vectors out. Thread-safe."""

    spec: EncodingSpec
    takes: frozenset[str] = frozenset({"text"})
    """Inputs it encodes: of `kinds()`. Queries may be any of these, passages are what the spec says."""

    @abstractmethod
    def encode(self, inputs: Sequence[Input], role: Role) -> Vectors:
        """The vectors of N inputs, without NaN, in the representation of `spec.kind`.

        Raises DataError for an image that cannot be read, or one for an encoder of texts.
        """

    def tokens_of(self, text: str, role: Role) -> tuple[int, int] | None:
        """Tokens of a text, and how many of them are read: fewer where it is cut. None: it cannot tell.

        Of a text that is much too long the first of the two may be too small.
        """
        return None

    def text_of(self, token_ids: Sequence[int]) -> str | None:
        """Return the text of its tokenizer's tokens. None: it cannot tell. DataError for one it lacks."""
        return None


@dataclass(frozen=True)
class Multi:
    """Vectors of the tokens of N texts: text i owns values[offsets[i]:offsets[i + 1]]."""

    values: np.ndarray
    """(T, D) float32"""
    offsets: np.ndarray
    """(N + 1,) int64"""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        """The vectors of text `i`.   (tokens, D)"""
        return self.values[self.offsets[i] : self.offsets[i + 1]]


def concatenate(parts: list[Vectors]) -> Vectors:
    """The vectors of all texts of `parts`, in order."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    if isinstance(parts[0], Multi):
        lengths = np.concatenate([np.diff(part.offsets) for part in parts])
        values = np.concatenate([part.values for part in parts])
        return Multi(values, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    from scipy.sparse import vstack

    return vstack(parts, format="csr")


def take(vectors: Vectors, rows: np.ndarray) -> Vectors:
    """The vectors of the texts `rows`, in this order."""
    if not isinstance(vectors, Multi):
        return vectors[rows]
    taken = [vectors[int(row)] for row in rows]
    return Multi(np.concatenate(taken), np.cumsum([0, *map(len, taken)], dtype=np.int64))


def in_order(parts: list[Vectors], positions: list[np.ndarray]) -> Vectors:
    """Join the vectors of batches, in the order of the positions of their texts; `parts` is emptied."""
    vectors = concatenate(parts)
    parts.clear()  # they may be large
    return take(vectors, np.argsort(np.concatenate(positions)))


def no_vectors(kind: str, dimension: int, count: int = 0) -> Vectors:
    """The vectors of no text, or of `count` that have none: no token, or zeros."""
    if kind == "multi":
        return Multi(np.zeros((0, dimension), np.float32), np.zeros(count + 1, np.int64))
    none = np.zeros((count, dimension), np.float32)
    if kind == "dense":
        return none
    from scipy.sparse import csr_array

    return csr_array(none)


def similarities(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row of `a` with that of `b`; 1 for two zero rows, NaN stays.   (N, D) -> (N,)"""
    if a.shape != b.shape:
        return np.zeros(1)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = ~(a.any(axis=1) | b.any(axis=1))
    return np.where(both_zero, 1.0, (a * b).sum(axis=1) / np.where(lengths == 0, 1, lengths))


def rows_of(vectors: Vectors, i: int) -> np.ndarray:
    """Text `i` of any representation as a dense matrix."""
    if isinstance(vectors, Multi):
        return vectors[i]
    if isinstance(vectors, np.ndarray):
        return vectors[i : i + 1]
    return vectors[[i]].toarray()
