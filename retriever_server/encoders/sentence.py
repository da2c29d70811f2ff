"""Encoders of sentence-transformers (dense, sparse, multi-vector), with their saved prompts.

Texts are tokenised together, sorted by their number of tokens and cut into batches of about as many
tokens each, padding included: so that a batch of short texts is large and one of long texts is small.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from data.errors import ConfigError, DataError
from data.jsonl import read_json, write_json
from data.records import FORMAT_VERSION, Input
from retriever_server.encoders.packing import packable, packed_forward
from retriever_server.encoders.proofs import describe_first, prove
from retriever_server.encoders.spec import Encoder, EncodingSpec, Role, self_test
from retriever_server.encoders.vectors import Multi, Vectors, concatenate, no_vectors, take
from retriever_server.retriever import texts_of

logger = logging.getLogger(__name__)

_CLASSES = {"dense": "SentenceTransformer", "sparse": "SparseEncoder", "multi": "MultiVectorEncoder"}
_PASSAGE_PROMPTS = ("document", "passage", "corpus")  # the order of sentence-transformers
_TASKS = {"query": "query", "passage": "document"}
_TEXTS_TOKENISED_TOGETHER = 8192
DEFAULT_TEMPLATE = "{title}\n{text}"
SPEC_FILE = "encoding_spec.json"
"""Beside a model that was trained here: the spec it was trained under."""
# On a CPU what fits its caches is fastest; a GPU wants to be filled.
_BATCH_TOKENS = {"cpu": 1024, "cuda": 65536}
_LOADED: WeakValueDictionary[tuple[str, str, str], SentenceEncoder] = WeakValueDictionary()


def load_encoder(
    model: str | EncodingSpec,
    kind: str | None = None,
    query_prompt: str | None = None,
    passage_prompt: str | None = None,
    passage_template: str = DEFAULT_TEMPLATE,
    max_tokens: int | None = None,
    dimension: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> SentenceEncoder:
    """The encoder of a sentence-transformers model by name or folder, or the one that a spec describes.

    What is not given is as the model saved it. kind: dense, sparse or multi, read from the model if
    None. dimension: keep the first so many of a dense vector (Matryoshka). dtype: of the computation.
    A spec decides everything but device and dtype; an encoder that is loaded already is shared.
    Raises ConfigError if no such model loads, or it was trained under another spec than is asked for;
    DataError if it is not the model of the spec, or its vectors depend on their batch.
    """
    device = choose_device(device)
    if isinstance(model, EncodingSpec):
        shared = _LOADED.get((model.hash, device, dtype))
        return shared or _load_by_spec(model, device, dtype)
    loaded = load_model(model, kind, device, dtype)
    if max_tokens is not None:
        loaded.max_seq_length = max_tokens
    if dimension is not None:
        loaded.truncate_dim = dimension
    trained = saved_spec(model)
    if trained and passage_template == DEFAULT_TEMPLATE:
        passage_template = trained.passage_template
    spec = read_spec(model, loaded, passage_template)
    prompts = {"query_prompt": query_prompt, "passage_prompt": passage_prompt}
    spec = replace(spec, **{name: prompt for name, prompt in prompts.items() if prompt is not None})
    if trained:
        _check_trained(spec, trained, dimension)
    prove(loaded)
    encoder = SentenceEncoder(loaded, spec)
    self_test(encoder)
    _LOADED[spec.hash, device, dtype] = encoder
    return encoder


def _load_by_spec(spec: EncodingSpec, device: str, dtype: str) -> SentenceEncoder:
    encoder = load_encoder(
        spec.model, spec.kind, spec.query_prompt, spec.passage_prompt, spec.passage_template,
        spec.max_tokens, spec.dimension if spec.kind == "dense" else None, device, dtype,
    )  # fmt: skip
    if encoder.spec.hash != spec.hash:
        raise DataError(
            f"{spec.model}: is another encoder than was asked for ({encoder.spec.differences(spec)})"
        )
    return encoder


def save_spec(spec: EncodingSpec, folder: str | Path) -> None:
    """Put the spec that a model was trained under beside it."""
    write_json(Path(folder) / SPEC_FILE, {"format_version": FORMAT_VERSION, **asdict(spec), "model": ""})


def saved_spec(model: str) -> EncodingSpec | None:
    """The spec that the model in a folder was trained under, None where none is there."""
    path = Path(model) / SPEC_FILE
    if not path.is_file():
        return None
    fields = read_json(path)
    fields.pop("format_version", None)
    try:
        return EncodingSpec(**fields)
    except TypeError as error:
        raise DataError(f"{path}: not an encoding spec ({error})") from error


def _check_trained(spec: EncodingSpec, trained: EncodingSpec, dimension: int | None) -> None:
    """A model serves under the spec it was trained under; only its vectors may be cut, and its texts."""
    if dimension is not None:
        spec = replace(spec, dimension=trained.dimension, normalise=trained.normalise)
    if spec.max_tokens != trained.max_tokens:
        logger.warning(
            "%s: trained with texts of %s tokens, here %s", spec.model, trained.max_tokens, spec.max_tokens
        )
        spec = replace(spec, max_tokens=trained.max_tokens)
    if spec.hash != trained.hash:
        raise ConfigError(f"encoder {spec.model!r}: trained under another spec ({spec.differences(trained)})")


class SentenceEncoder(Encoder):
    """A loaded model of sentence-transformers under its spec; `load_encoder` makes it."""

    def __init__(self, model: Any, spec: EncodingSpec) -> None:
        self.spec = spec
        self._model = model.eval()
        self._lock = threading.Lock()  # fast tokenizers refuse a second thread
        self._packs = spec.kind == "dense" and packable(model)
        self.batch_tokens = _BATCH_TOKENS.get(model.device.type, 8192)
        if spec.kind == "sparse" and model.device.type != "cpu":
            self.batch_tokens //= 8  # every token has a logit for each word of the vocabulary
        self.real_tokens = 0
        """Tokens of texts encoded so far, and `padded_tokens` what was computed for them."""
        self.padded_tokens = 0

    def encode(self, inputs: Sequence[Input], role: Role) -> Vectors:
        """As `Encoder.encode`."""
        texts = texts_of(inputs, self.spec.model)
        starts = range(0, len(texts), _TEXTS_TOKENISED_TOGETHER) or [0]
        with self._lock:
            parts = [self._encode(texts[i : i + _TEXTS_TOKENISED_TOGETHER], role) for i in starts]
        return concatenate(parts)

    def _encode(self, texts: list[str], role: Role) -> Vectors:
        import torch

        order, parts = [], []
        with torch.inference_mode():
            for rows, features in self._batches(texts, role):
                on_device = {
                    key: value.to(self._model.device) if torch.is_tensor(value) else value
                    for key, value in features.items()
                }
                order.append(rows)
                parts.append(self._vectors(self._forward(on_device, role)))
        if not texts:
            return no_vectors(self.spec.kind, self.spec.dimension)
        return take(concatenate(parts), np.argsort(np.concatenate(order)))

    def _batches(self, texts: list[str], role: Role) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """Positions of texts, and the features of these, trimmed to the longest of them."""
        if not texts:
            return
        prompt = self.spec.query_prompt if role == "query" else self.spec.passage_prompt
        features = self._model.preprocess(texts, prompt=prompt or None, task=_TASKS[role])
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

    def _forward(self, features: dict[str, Any], role: Role) -> dict[str, Any]:
        if self._packs:
            out, computed = packed_forward(self._model, features)
        else:
            out, computed = self._model(features, task=_TASKS[role]), features["input_ids"].numel()
        self.padded_tokens += computed
        return out

    def _vectors(self, out: dict[str, Any]) -> Vectors:
        if self.spec.kind == "multi":
            kept = [e[m] for e, m in zip(out["token_embeddings"], out["attention_mask"].bool(), strict=True)]
            offsets = np.cumsum([0, *map(len, kept)], dtype=np.int64)
            return Multi(self._finish(np.concatenate([_numpy(vectors) for vectors in kept])), offsets)
        vectors = _numpy(out["sentence_embedding"])
        if self.spec.kind == "sparse":
            from scipy.sparse import csr_array

            limit = getattr(self._model, "max_active_dims", None)
            return csr_array(keep_largest(vectors, limit))
        return self._finish(vectors[:, : self.spec.dimension])

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
        fits = (
            np.searchsorted(ends, ends[start] - first + budget, "right") - start
            if packed
            else budget // max(1, first)
        )
        yield order[start : start + max(1, int(fits))]
        start += max(1, int(fits))


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


def choose_device(device: str) -> str:
    """auto -> cuda where there is one, else cpu. Raises ConfigError for a device that there is not."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    name = device.partition(":")[0]
    if name not in ("cpu", "cuda", "mps") or (name == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"device = {device}: must be auto, cpu, or cuda where torch has it")
    return device


def _saved_kind(model: str) -> str:
    """The kind that the model was saved as; dense where it does not say."""
    from sentence_transformers.util import load_file_path

    try:
        path = load_file_path(model, "config_sentence_transformers.json")
    except OSError as error:
        raise _not_loaded(model, error) from error
    saved = json.loads(Path(path).read_text()) if path else {}
    if saved.get("model_type") == "ColBERT" or saved.get("similarity_fn_name") == "MaxSim":
        return "multi"  # saved by PyLate
    return next((kind for kind, name in _CLASSES.items() if name == saved.get("model_type")), "dense")


def load_model(model: str, kind: str | None = None, device: str = "cpu", dtype: str = "float32") -> Any:
    """The model of sentence-transformers by name or folder, of the kind it was saved as if None.

    Raises ConfigError.
    """
    if model.startswith((".", "/")) and not Path(model).is_dir():
        raise ConfigError(f"encoder {model!r}: no such folder")  # at once, not after seconds of imports
    import sentence_transformers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    kind = kind or _saved_kind(model)
    if kind not in _CLASSES:
        raise ConfigError(f"encoder kind {kind!r}: must be one of {', '.join(_CLASSES)}")
    kind_of_model = getattr(sentence_transformers, _CLASSES[kind])
    try:
        loaded = kind_of_model._load_with_module_classes(
            model, _own_modules(), device=device, model_kwargs={"dtype": dtype}
        )
    except (OSError, ValueError) as error:
        raise _not_loaded(model, error) from error
    if hasattr(loaded[0], "unpad_inputs"):
        loaded[0].unpad_inputs = False  # our batches are rectangles with little padding
    return loaded


def _own_modules() -> dict[str, Any]:
    """The modules of ours that a saved model may name: these alone load without trust_remote_code."""
    from retriever_server.encoders.m3 import M3Heads
    from retriever_server.encoders.promptreps import PromptReps
    from retriever_server.encoders.token_weights import TokenWeights

    return {f"{of.__module__}.{of.__qualname__}": of for of in (TokenWeights, M3Heads, PromptReps)}


def _not_loaded(model: str, error: Exception) -> ConfigError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ConfigError(f"encoder {model!r}: no sentence-transformers model loads from there ({reason})")


def read_spec(name: str, model: Any, passage_template: str = DEFAULT_TEMPLATE) -> EncodingSpec:
    """What a loaded model of sentence-transformers says of itself, as the spec that will serve."""
    kind = next(k for k, of in _CLASSES.items() if of in [each.__name__ for each in type(model).__mro__])
    similarity = model.similarity_fn_name
    if similarity not in ("cosine", "dot", "maxsim"):
        raise ConfigError(f"encoder {name!r}: similarity {similarity!r}; supported: cosine, dot, maxsim")
    saved_prompts = [model.prompts[key] for key in _PASSAGE_PROMPTS if key in model.prompts]
    modules = _describe(list(model), getattr(model, "max_active_dims", None))
    return EncodingSpec(
        model=str(name),
        kind=kind,
        fingerprint=fingerprint(model),
        dimension=_dimension(model, kind),
        query_prompt=model.prompts.get("query") or "",
        passage_prompt=next(iter(saved_prompts), "") or "",
        passage_template=passage_template,
        max_tokens=model.max_seq_length,
        pooling=" > ".join(filter(None, [*describe_first(model), modules])),
        normalise=(kind == "dense" and similarity == "cosine") or _ends_normalised(model),
        similarity=similarity,
    )


def _dimension(model: Any, kind: str) -> int:
    if kind == "sparse":  # what it says of itself is right only after its first text
        return int(model.encode(["a text"], show_progress_bar=False).shape[1])
    return int(getattr(model, "truncate_dim", None) or model.get_embedding_dimension())


def _describe(modules: list[Any], limit: int | None = None) -> str:
    """The modules after the transformer, of both towers where there are two; how many entries are kept."""
    kept = [f"largest {limit}"] if limit else []
    parts = [_describe_module(module) for module in modules[1:]]
    if routes := getattr(modules[0], "sub_modules", None):
        inner = [f"{name}: {' > '.join(map(_describe_module, tower))}" for name, tower in routes.items()]
        parts.insert(0, f"({'; '.join(inner)})")
    return " > ".join(parts + kept)


def _describe_module(module: Any) -> str:
    mode = getattr(module, "pooling_mode", None) or getattr(module, "pooling_strategy", None)
    if mode and not getattr(module, "include_prompt", True):
        mode = f"{mode}, without prompt"
    return type(module).__name__ + (f"({mode})" if mode else "")


def _ends_normalised(model: Any) -> bool:
    return type(list(model)[-1]).__name__ == "Normalize" and getattr(model, "truncate_dim", None) is None


def fingerprint(model: Any) -> str:
    """Short hash of at most 256 values of each weight, rounded to bfloat16, and of the vocabulary."""
    import torch

    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 256)].to(torch.bfloat16).float().cpu()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + sample.numpy().tobytes())
    vocabulary = getattr(model.tokenizer, "get_vocab", dict)()
    digest.update(json.dumps(sorted(vocabulary.items())).encode())
    return digest.hexdigest()[:16]
