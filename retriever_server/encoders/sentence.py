"""Encoders of sentence-transformers (dense, sparse, multi-vector), with their saved prompts.

Texts are tokenised together, sorted by their number of tokens and cut into batches of about as many tokens
each, padding included. Images are read by threads ahead of the model, and cut into batches of about as many
pixels each. For trunks of BERT's kind, which take a mask of pairs and positions that start anew, rows are
filled with several texts, each attending to itself alone: padding costs a third of the work otherwise.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data.errors import DataError
from data.records import Input
from data.text import cut_for
from retriever_server.encoders.image_inputs import (
    WHOLE,
    as_model_input,
    input_kind,
    one_ahead,
    picture_batches,
    uncut,
)
from retriever_server.encoders.read_spec import patch_token, placeholders, what_it_takes
from retriever_server.encoders.spec import Encoder, EncodingSpec, Multi, Role, Vectors, in_order, no_vectors

Batch = tuple[np.ndarray, dict[str, Any]]
"""Positions of inputs, and the features of these."""
_TASKS = {"query": "query", "passage": "document"}
_TEXTS_TOKENISED_TOGETHER = 8192
# On a CPU what fits its caches is fastest; a GPU wants to be filled.
_BATCH_TOKENS = {"cpu": 1024, "cuda": 65536}
_BATCH_PIXELS = {"cpu": 1 << 20, "cuda": 1 << 27}  # numbers, three a pixel


class SentenceEncoder(Encoder):
    """A loaded model of sentence-transformers under its spec; `load_encoder` makes it."""

    def __init__(self, model: Any, spec: EncodingSpec) -> None:
        self.spec = spec
        self._model = model.eval()
        self._lock = threading.Lock()  # fast tokenizers refuse a second thread
        self._packs = spec.kind == "dense" and packable(model)
        self.takes = frozenset(what_it_takes(model))
        files = self.takes != {"text"}
        self._placeholders, self._patch = (placeholders(model), patch_token(model)) if files else ([], None)
        self._tokenizer = getattr(model, "tokenizer", None)
        limits = (getattr(model[0], name, None) for name in ("query_length", "document_length"))
        self._longest = model.max_seq_length and max(model.max_seq_length, *(limit or 0 for limit in limits))
        self._token_pooling: Any = None
        if spec.token_pooling:
            from retriever_server.encoders.token_pooling import TokenPooling

            self._token_pooling = TokenPooling.parse(spec.token_pooling)
        self.batch_tokens = _BATCH_TOKENS.get(model.device.type, 8192)
        self.batch_pixels = _BATCH_PIXELS.get(model.device.type, 1 << 22)
        if spec.kind == "sparse" and model.device.type != "cpu":
            self.batch_tokens //= 8  # every token has a logit for each word of the vocabulary
        self.real_tokens = 0
        """Tokens encoded so far, and `padded_tokens` what was computed for them."""
        self.padded_tokens = 0
        self.images = 0
        """Images encoded so far; the model worked `model_seconds` and waited `waited_seconds` for them."""
        self.model_seconds = self.waited_seconds = 0.0

    def encode(self, inputs: Sequence[Input], role: Role) -> Vectors:
        of = np.array([input_kind(each) for each in inputs])
        for kind in sorted({*of.tolist()} - self.takes):
            raise DataError(f"{self.spec.model}: reads {' or '.join(sorted(self.takes))}, {kind} was given")
        if not inputs:
            return no_vectors(self.spec.kind, self.spec.dimension)
        import torch

        order, parts = [], []
        with self._lock, torch.inference_mode():
            for rows, features in self._all_batches(inputs, of, role):
                on_device = {
                    key: value.to(self._model.device) if torch.is_tensor(value) else value
                    for key, value in features.items()
                }
                order.append(rows)
                parts.append(self._vectors(self._forward(on_device, role), role))
        return in_order(parts, order)

    def _all_batches(self, inputs: Sequence[Input], of: np.ndarray, role: Role) -> Iterator[Batch]:
        """Positions of inputs, and the features of these: of texts, of images, of both together in turn."""
        for kind in dict.fromkeys(of.tolist()):
            size, batches = _TEXTS_TOKENISED_TOGETHER, self._batches
            if kind != "text":
                size, batches = len(inputs), self._picture_batches
            places = np.flatnonzero(of == kind)
            for start in range(0, len(places), size):
                chosen = places[start : start + size]
                for rows, features in batches([inputs[int(i)] for i in chosen], role):
                    yield chosen[rows], features

    def _preprocess(self, inputs: list[Any], role: Role, **options: Any) -> dict[str, Any]:
        return self._model.preprocess(inputs, prompt=self._prompt(role), task=_TASKS[role], **options)

    def _prompt(self, role: Role) -> str | None:
        return (self.spec.query_prompt if role == "query" else self.spec.passage_prompt) or None

    def _batches(self, texts: list[Input], role: Role) -> Iterator[Batch]:
        """Positions of texts, and the features of these, trimmed to the longest of them."""
        features = self._preprocess([self._given(str(text)) for text in texts], role)
        mask = features.get("attention_mask")
        if mask is None or mask.ndim != 2:  # bags of words have no padding
            yield np.arange(len(texts)), features
            return
        used = mask.bool()
        if (expanded := features.get("query_expansion_positions")) is not None:
            used = used | expanded.bool()
        lengths = used.sum(1).numpy()
        padded_left = bool(used[:, -1].all())
        for rows in token_budget_batches(lengths, self.batch_tokens, self._packs):
            width = int(lengths[rows].max())
            self.real_tokens += int(lengths[rows].sum())
            columns = slice(mask.shape[1] - width, None) if padded_left else slice(0, width)
            yield rows, {key: _cut(value, rows, columns, mask.shape) for key, value in features.items()}

    def tokens_of(self, text: str, role: Role) -> tuple[int, int] | None:
        given = [self._given(text)]
        with self._lock:
            if tokens_of := getattr(self._model[0], "tokens_of", None):
                return tokens_of(given[0], self._prompt(role))
            masks = [self._preprocess(given, role, **how).get("attention_mask") for how in (WHOLE, {})]
        whole, read = (0 if mask is None else int(mask.sum()) for mask in masks)
        return max(whole, read), read  # a query may be filled up

    def text_of(self, token_ids: Sequence[int]) -> str | None:
        """Decode as `Encoder.text_of` says; special tokens, which it adds itself, are left out."""
        if self._tokenizer is None or not hasattr(self._tokenizer, "decode"):
            return None
        if max(token_ids) >= (size := len(self._tokenizer)):
            raise DataError(f"token {max(token_ids)}: the encoder has those below {size}")
        with self._lock:
            return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    def _given(self, text: str) -> Any:
        text = self._cut(text)
        return text if self.takes == {"text"} else as_model_input(text, placeholders=self._placeholders)

    def _cut(self, text: str) -> str:
        return cut_for(self._tokenizer, text, self._longest)

    def _picture_batches(self, items: list[Input], role: Role) -> Iterator[Batch]:
        """Positions of items that hold images, and the features of these, made while the model works."""

        def process(items: list[Input], pictures: list[Any]) -> dict[str, Any]:
            each = zip(items, pictures, strict=True)
            given = [as_model_input(item, picture, self._placeholders) for item, picture in each]
            given = [it | {"text": self._cut(it["text"])} if "text" in it else it for it in given]
            return uncut(self._model, given, lambda inputs, **k: self._preprocess(inputs, role, **k))

        batches, began = one_ahead(picture_batches(items, process, self.batch_pixels)), time.monotonic()
        for rows, features in batches:
            ready = time.monotonic()
            self.waited_seconds += ready - began
            self.real_tokens += int(features["attention_mask"].sum()) if "attention_mask" in features else 0
            yield rows, features
            began = time.monotonic()
            self.model_seconds += began - ready
            self.images += len(rows)

    def _forward(self, features: dict[str, Any], role: Role) -> dict[str, Any]:
        if self._packs:
            out, computed = packed_forward(self._model, features)
        else:
            tokens = features.get("input_ids")  # a vision tower alone has none
            out, computed = self._model(features, task=_TASKS[role]), 0 if tokens is None else tokens.numel()
        self.padded_tokens += computed
        return out

    def _vectors(self, out: dict[str, Any], role: Role) -> Vectors:
        if self.spec.kind == "multi":
            masks = out["attention_mask"].bool()  # padding has no vector: a zero one would win every maximum
            kept = [self._finish(_numpy(e[m])) for e, m in zip(out["token_embeddings"], masks, strict=True)]
            if self._token_pooling and role == "passage":
                patches = self._are_patches(out, masks)
                kept = [self._token_pooling.pool(*each) for each in zip(kept, patches, strict=True)]
            return Multi(np.concatenate(kept), np.cumsum([0, *map(len, kept)], dtype=np.int64))
        vectors = _numpy(out["sentence_embedding"])
        if self.spec.kind == "sparse":
            from scipy.sparse import csr_array

            limit = getattr(self._model, "max_active_dims", None)
            return csr_array(keep_largest(vectors, limit))
        return self._finish(vectors[:, : self.spec.dimension])

    def _are_patches(self, out: dict[str, Any], masks: Any) -> list[np.ndarray]:
        """Mark the vectors that are of a patch of an image, among those that are kept."""
        if "input_ids" not in out:  # a vision tower alone
            return [np.ones(int(mask.sum()), bool) for mask in masks]
        of = out["input_ids"] == (-1 if self._patch is None else self._patch)
        return [row[mask].cpu().numpy() for row, mask in zip(of, masks, strict=True)]

    def _finish(self, vectors: np.ndarray) -> np.ndarray:
        if not self.spec.normalise:
            return np.ascontiguousarray(vectors)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def token_budget_batches(lengths: np.ndarray, budget: int, packed: bool = False) -> Iterator[np.ndarray]:
    """Positions, longest first, in batches of at most `budget` tokens, at least one text in each.

    Padding counts, unless the texts of a batch will be packed.
    """
    order = np.argsort(-lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    start = 0
    while start < len(order):
        first = int(lengths[order[start]])
        fits = budget // max(1, first)
        if packed:
            fits = int(np.searchsorted(ends, ends[start] - first + budget, "right")) - start
        yield order[start : start + max(1, fits)]
        start += max(1, fits)


def keep_largest(weights: np.ndarray, limit: int | None) -> np.ndarray:
    """Rows with all but their `limit` largest entries zero.   (N, V) -> (N, V)"""
    if limit is None or limit >= weights.shape[1]:
        return weights
    kept = np.argpartition(weights, -limit, axis=1)[:, -limit:]
    out = np.zeros_like(weights)
    np.put_along_axis(out, kept, np.take_along_axis(weights, kept, axis=1), axis=1)
    return out


def _cut(value: Any, rows: np.ndarray, columns: slice, shape: Any) -> Any:
    of = getattr(value, "shape", ())
    if of == shape:
        return value[rows][:, columns]
    return value[rows] if len(of) > 1 and of[0] == shape[0] else value  # what else there is of each text


def _numpy(tensor: Any) -> np.ndarray:
    dense = tensor.to_dense() if tensor.is_sparse else tensor
    return dense.float().cpu().numpy()


def packable(model: Any) -> bool:
    """Return whether the trunk of a sentence-transformers model is a BERT: MiniLM, BGE, E5, GTE and more."""
    trunk: Any = getattr(model[0], "auto_model", None)
    return type(trunk).__name__ == "BertModel" and not trunk.config.is_decoder


def fill_rows(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Row and first column of each text, and the number of rows, as long as the longest text (first fit).

    lengths (N,), longest first -> (N,), (N,), R.   [5, 3, 2, 2] -> rows [0, 1, 1, 2], columns [0, 0, 3, 0]
    """
    width, room = int(lengths[0]), []
    rows, columns = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    for i, length in enumerate(lengths.tolist()):
        row = next((row for row, free in enumerate(room) if free >= length), len(room))
        if row == len(room):
            room.append(width)
        rows[i], columns[i] = row, width - room[row]
        room[row] -= length
    return rows, columns, len(room)


def packed_forward(model: Any, features: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Run the model on the features of texts, longest first; -> its output, the number of tokens computed."""
    import torch

    mask = features["attention_mask"].bool()
    lengths = mask.sum(1).cpu().numpy()
    rows, columns, count = fill_rows(lengths)
    width = int(lengths[0])
    text, at = mask.nonzero(as_tuple=True)  # of each token: its text, its place in it
    row = torch.from_numpy(rows).to(at.device)[text]
    column = torch.from_numpy(columns).to(at.device)[text] + at

    def packed(values: Any) -> Any:
        out = torch.zeros((count, width), dtype=torch.long, device=at.device)
        out[row, column] = values
        return out

    owner = packed(text + 1)
    pairs = (owner[:, :, None] == owner[:, None, :])[:, None]  # (R, 1, T, T)
    ids = {name: packed(features[name][mask]) for name in ("input_ids", "token_type_ids") if name in features}
    trunk, *rest = model
    hidden = trunk({**ids, "attention_mask": pairs, "position_ids": packed(at)})["token_embeddings"]
    tokens = hidden.new_zeros((*mask.shape, hidden.shape[-1]))
    tokens[mask] = hidden[row, column]
    out = {**features, "token_embeddings": tokens}
    for module in rest:
        out = module(out)
    return out, count * width
