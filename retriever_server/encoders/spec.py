"""The interface of encoders, and the spec that holds everything which decides their vectors."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from data.errors import ConfigError, DataError
from data.modalities import kinds
from data.records import Input, Item, Passage
from retriever_server.encoders.kinds import ENCODERS
from retriever_server.encoders.vectors import Vectors

Role = Literal["query", "passage"]


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
    """Whether vectors have length 1, whatever the model leaves."""
    similarity: str = "dot"
    """cosine (of vectors of length 1), dot or maxsim."""
    inputs: str = "text"
    """Part of a passage that is encoded: text, image, or text+image (what it has of both); or audio"""
    image_processor: str = ""
    """Processing of an image before the model sees it: processor, pixels, patches, tokens."""
    token_pooling: str = ""
    """Pooling of the token vectors of a passage before they are stored, such as rows:4; "" not at all."""

    def __post_init__(self) -> None:
        if self.kind not in ENCODERS:
            raise ConfigError(f"encoder kind {self.kind!r}: must be one of {', '.join(ENCODERS)}")
        if self.inputs not in kinds():
            known = f"must be one of {', '.join(kinds())} (data.modalities registers more)"
            raise ConfigError(f"encoder inputs {self.inputs!r}: {known}")
        try:
            self.render_text(Passage("", "text", "title"))
        except (KeyError, IndexError, ValueError) as error:
            allowed = "may name {title}, {text}, {contents} and {expansion}"
            raise ConfigError(f"passage_template {self.passage_template!r}: {allowed}") from error

    @property
    def hash(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of all fields that decide vectors."""
        later = {"inputs": "text", "image_processor": "", "token_pooling": ""}  # hashed where they say more
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
        fields = {"title": passage.title, "text": passage.text, "contents": passage.contents}
        fields["expansion"] = str(passage.metadata.get("expansion", ""))
        return self.passage_template.format(**fields).strip()

    def differences(self, other: EncodingSpec, but: str = "") -> str:
        """List the fields of the hash that differ, for a message.   -> "pooling: cls, here mean" """
        here, there = asdict(self), asdict(other)
        odd = [key for key in here if key not in ("model", but) and here[key] != there[key]]
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
