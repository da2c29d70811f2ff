"""Texts encoded by a server of OpenAI's `/v1/embeddings` (vLLM, TEI, ours) that holds the same dense model.

The model is loaded here, too: it says the spec, and the server's vectors are compared with its own first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np

from data.errors import ConfigError, DataError, RetrieverError
from data.records import Input
from retriever_server.client.retries import TryAgain, certificates, delay_seconds, may_pass
from retriever_server.encoders.spec import Encoder, Role, no_vectors

ALLOWED_DIFFERENCE = 1e-3
"""Largest difference of any number of a vector of length 1 between the server and the model here."""
_SAMPLE = (
    "a river",
    "Who built the tower of Paris, and when?",
    "It was finished in 1889. " * 30,
    "naïve 1,5 €",
)
_TEXTS_A_REQUEST, _REQUESTS_AT_ONCE, _TRIES, _TIMEOUT_SECONDS = 64, 4, 5, 120.0


class ServedEncoder(Encoder):
    """An encoder whose work a server does. Raises ConfigError where the server's vectors are others."""

    def __init__(self, own: Encoder, url: str) -> None:
        """own: the same model, loaded here. url: such as http://127.0.0.1:8001/v1."""
        self.spec, self._url = own.spec, url.rstrip("/").removesuffix("/embeddings")
        of_texts = own.spec.kind == "dense" and own.spec.inputs == "text"
        if not of_texts or not url.startswith(("http://", "https://")):
            wanted = "the URL of an embeddings server, with a dense encoder of texts"
            raise ConfigError(f"encode_with {url!r}: must be {wanted}, {own.spec.model} is {own.spec.kind}")
        # No proxy from the environment: nothing but the arguments decides where a request goes.
        self._client = httpx.Client(timeout=_TIMEOUT_SECONDS, trust_env=False, verify=certificates())
        self._name = self._ask(lambda answer: str(answer["data"][0]["id"]), "GET", "models")
        apart = float(np.abs(self.encode(_SAMPLE, "passage") - own.encode(_SAMPLE, "passage")).max())
        if not apart <= ALLOWED_DIFFERENCE:
            allowed = f"allowed is {ALLOWED_DIFFERENCE:g} (the same weights, pooling and float32 there?)"
            raise ConfigError(
                f"encode_with {url}: vectors differ by {apart:.2g} from {own.spec.model}, {allowed}"
            )

    def encode(self, inputs: Sequence[Input], role: Role) -> np.ndarray:
        """Encode as `Encoder.encode` says, a few requests at once."""
        if not inputs:
            return no_vectors("dense", self.spec.dimension)
        prompt = self.spec.query_prompt if role == "query" else self.spec.passage_prompt
        texts = [prompt + str(text) for text in inputs]
        starts = range(0, len(texts), _TEXTS_A_REQUEST)
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            parts = list(pool.map(lambda at: self._vectors(texts[at : at + _TEXTS_A_REQUEST]), starts))
        vectors = np.concatenate(parts)[:, : self.spec.dimension]
        if self.spec.normalise:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors

    def _vectors(self, texts: list[str]) -> np.ndarray:
        body = {"model": self._name, "input": texts, "encoding_format": "float"}
        if self.spec.max_tokens:  # vLLM refuses what is too long, unless it is told to cut
            body["truncate_prompt_tokens"] = self.spec.max_tokens
        vectors = self._ask(_embeddings, "POST", "embeddings", body)
        if vectors.ndim != 2 or len(vectors) != len(texts) or not np.isfinite(vectors).all():
            raise DataError(f"encode_with {self._url}: vectors {vectors.shape} of {len(texts)} texts, or NaN")
        if vectors.shape[1] < self.spec.dimension:
            raise ConfigError(
                f"encode_with {self._url}: {vectors.shape[1]} dimensions, not {self.spec.dimension}"
            )
        return vectors

    def _ask(self, read: Callable[[Any], Any], method: str, path: str, body: Any = None) -> Any:
        """Return what `read` finds in the JSON that the server answers; what may pass is tried again."""
        for failures in range(1, _TRIES + 1):
            try:
                answer = self._client.request(method, f"{self._url}/{path}", json=body)
                if not may_pass(answer.status_code):
                    break
                raise TryAgain(f"answered {answer.status_code}")
            except (httpx.HTTPError, TryAgain) as error:
                if failures == _TRIES:
                    said = f"{type(error).__name__}: {error}"
                    raise RetrieverError(f"encode_with {self._url}: {said}") from error
            time.sleep(delay_seconds(failures))
        if answer.status_code != 200:
            raise RetrieverError(f"encode_with {self._url}: {answer.status_code}: {answer.text[:200]}")
        try:
            return read(answer.json())
        except (LookupError, TypeError, ValueError) as error:
            said = f"answered {answer.text[:60]!r}, must be an embeddings server of OpenAI's form"
            raise ConfigError(f"encode_with {self._url}: /{path} {said}") from error


def _embeddings(answer: Any) -> np.ndarray:
    rows = sorted(answer["data"], key=lambda row: row["index"])
    return np.array([row["embedding"] for row in rows], np.float32)
