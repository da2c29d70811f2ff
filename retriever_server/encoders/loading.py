"""Models of sentence-transformers, of the kind they were saved as, and encoders of them.

Beside a model that was trained here lies the spec it was trained under: it serves under no other.
"""

from __future__ import annotations

import json
import logging
from collections import UserDict
from dataclasses import asdict, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from data.errors import ConfigError, DataError, require
from data.jsonl import read_json, write_json
from data.machine.device import check_device, choose_dtype, resolve_device
from data.models.hub import find_model
from data.records import FORMAT_VERSION
from retriever_server.encoders.checks import check_model, limit_tokens, self_test
from retriever_server.encoders.read_spec import DEFAULT_TEMPLATE, read_spec
from retriever_server.encoders.sentence import SentenceEncoder
from retriever_server.encoders.spec import ENCODERS, EncodingSpec

logger = logging.getLogger(__name__)

SPEC_FILE = "encoding_spec.json"
"""Beside a model that was trained here: the spec it was trained under."""
_LOADED: WeakValueDictionary[tuple[str, str, str], SentenceEncoder] = WeakValueDictionary()


class _OwnModules(UserDict[str, Any]):
    """The modules of ours that a saved model may name, imported when one does."""

    def __getitem__(self, name: str) -> Any:
        return getattr(import_module(name.rpartition(".")[0]), self.data[name])


_OWN = ("m3.M3Heads", "patches.PatchMask", "promptreps.PromptReps", "token_weights.TokenWeights")
_OWN_MODULES = _OwnModules({f"{__package__}.{name}": name.partition(".")[2] for name in _OWN})
"""These alone load without trust_remote_code."""


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
    inputs: str | None = None,
    token_pooling: str = "",
    query_style: str | None = None,
) -> SentenceEncoder:
    """The encoder of a sentence-transformers model by name or folder, or the one that a spec describes.

    What is not given is as the model saved it. kind: dense, sparse or multi, read from the model if
    None. dimension: keep the first so many of a dense vector (Matryoshka). dtype: of the computation.
    inputs: what of a passage is encoded, of `modalities.kinds()`; by default what it was trained with
    here, else the image where the model reads images. token_pooling: of a passage's vectors, as rows:4.
    query_style: as it was trained here, else query.
    A spec decides everything but device and dtype; an encoder that is loaded already is shared.
    Raises ConfigError if no such model loads, or it was trained under another spec than is asked for;
    DataError if it is not the model of the spec, or its vectors depend on their batch.
    """
    check_device(device)
    source = find_model(model.model if isinstance(model, EncodingSpec) else model, "encoder")
    device = resolve_device(device)
    if isinstance(model, EncodingSpec):
        shared = _LOADED.get((model.hash, device, dtype))
        return shared or _load_by_spec(model, device, dtype)
    loaded = load_model(source, kind, device, dtype)
    if kind == "multi":
        check_projects(source)
    limit_tokens(loaded, max_tokens)
    if dimension is not None:
        _keep_prefix(loaded, model, dimension)
    trained = saved_spec(source)
    if trained and passage_template == DEFAULT_TEMPLATE:
        passage_template = trained.passage_template
    spec = read_spec(model, loaded, passage_template, inputs or (trained.inputs if trained else None))
    if token_pooling and spec.kind != "multi":
        raise ConfigError(f"token_pooling {token_pooling!r}: {model} makes no vectors of tokens")
    spec = replace(spec, token_pooling=token_pooling)
    style = query_style or (trained.query_style if trained else None)
    given = {"query_prompt": query_prompt, "passage_prompt": passage_prompt, "query_style": style}
    spec = replace(spec, **{name: value for name, value in given.items() if value is not None})
    if trained:
        _check_trained(spec, trained, dimension)
    check_model(loaded)
    encoder = SentenceEncoder(loaded, spec)
    self_test(encoder)
    _LOADED[spec.hash, device, dtype] = encoder
    return encoder


def _load_by_spec(spec: EncodingSpec, device: str, dtype: str) -> SentenceEncoder:
    encoder = load_encoder(
        spec.model, spec.kind, spec.query_prompt, spec.passage_prompt, spec.passage_template,
        spec.max_tokens, spec.dimension if spec.kind == "dense" else None, device, dtype,
        spec.inputs, spec.token_pooling, spec.query_style,
    )  # fmt: skip
    if encoder.spec.hash != spec.hash:
        raise DataError(
            f"{spec.model}: is another encoder than was asked for ({encoder.spec.differences(spec)})"
        )
    return encoder


def _keep_prefix(loaded: Any, model: str, dimension: int) -> None:
    """Make the model's vectors their first `dimension` numbers."""
    if not hasattr(loaded, "truncate_dim"):
        raise ConfigError(f"dimension = {dimension}: {model} makes no dense vectors that could be cut")
    whole = loaded.get_embedding_dimension()
    require(1 <= dimension <= whole, "dimension", dimension, f"from 1 to the {whole} of {model}")
    loaded.truncate_dim = dimension


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
    """A model serves under the spec it was trained under; only its vectors may be cut or pooled, its texts
    cut, and what of a passage is encoded chosen."""
    for name, of in (("inputs", "passages of %s"), ("max_tokens", "texts of %s tokens")):
        here, there = getattr(spec, name), getattr(trained, name)
        if here != there:
            logger.warning(f"%s: trained with {of}, here %s", spec.model, there, here)
    cut = ("dimension", "normalise") if dimension is not None else ()
    if differences := spec.differences(trained, but=("token_pooling", "inputs", "max_tokens", *cut)):
        raise ConfigError(f"encoder {spec.model!r}: trained under another spec ({differences})")


def _saved_kind(model: str) -> str:
    """The kind that the model was saved as; dense where it does not say."""
    try:
        saved = _read_file(model, "config_sentence_transformers.json")
    except OSError as error:
        raise _not_loaded(model, error) from error
    if not saved and any(name.endswith("ForRetrieval") for name in _architectures(model)):
        return "multi"  # ColPali, ColQwen2 and theirs, as transformers saves them
    saved = json.loads(saved or "{}")
    if saved.get("model_type") == "ColBERT" or saved.get("similarity_fn_name") == "MaxSim":
        return "multi"  # saved by PyLate
    return next((name for name, of in ENCODERS.items() if of.class_name == saved.get("model_type")), "dense")


def kind_for(model: str, index: str | None) -> str | None:
    """Return sparse for a masked language model of transformers whose index is inverted, else None.

    So SPLADE's own code and Tevatron leave their models.
    """
    source = find_model(model, "encoder")
    if index != ENCODERS["sparse"].index or _read_file(source, "modules.json"):
        return None
    return "sparse" if any(name.endswith("ForMaskedLM") for name in _architectures(source)) else None


def _architectures(model: str) -> list[str]:
    """Return the classes of transformers that a model was saved as."""
    return json.loads(_read_file(model, "config.json") or "{}").get("architectures") or []


def _read_file(model: str, name: str) -> str:
    """Return the text of a file of a folder or of the hub, "" where it is not there."""
    from sentence_transformers.util import load_file_path

    path = load_file_path(model, name)
    return Path(path).read_text() if path else ""


def check_projects(model: str) -> None:
    """Raise ConfigError where vectors of tokens would be untrained projections of a base."""
    trained = "HF_ColBERT" in _read_file(model, "config.json")
    if trained or ".Dense" in _read_file(model, "modules.json") or _saved_kind(model) == "multi":
        return
    raise ConfigError(
        f"encoder {model!r}: kind 'multi' would put a random projection before its vectors of tokens; "
        "train one first (docs/training-retrievers.md), or take dimension: null of the recipe colbert"
    )


def load_model(model: str, kind: str | None = None, device: str = "cpu", dtype: str = "float32") -> Any:
    """Load the model of sentence-transformers that `find_model` found, of the kind it was saved as if None.

    Raises ConfigError.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    dtype = choose_dtype(dtype, device)
    kind = kind or _saved_kind(model)
    if kind not in ENCODERS:
        raise ConfigError(f"encoder kind {kind!r}: must be one of {', '.join(ENCODERS)}")
    try:
        loaded = ENCODERS[kind].model_class._load_with_module_classes(
            model, _OWN_MODULES, device=device, model_kwargs={"dtype": dtype}
        )
    except ImportError as error:  # a processor that needs what we do not: torchvision, timm, ...
        raise ConfigError(f"encoder {model!r}: {' '.join(str(error).split())[:200]}") from error
    except (OSError, ValueError) as error:
        if "video processor" in str(error) and find_spec("torchvision") is None:
            raise ConfigError(f"encoder {model!r}: its processor needs the package torchvision") from error
        raise _not_loaded(model, error) from error
    if hasattr(loaded[0], "unpad_inputs"):
        loaded[0].unpad_inputs = False  # our batches are rectangles with little padding
    return loaded


def _not_loaded(model: str, error: Exception) -> ConfigError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ConfigError(f"encoder {model!r}: no sentence-transformers model loads from there ({reason})")
