"""Checks before and after training: what is trained is what will serve."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.errors import ConfigError, DataError
from retriever_server.encoders.loading import load_model
from retriever_server.encoders.read_spec import fingerprint, read_spec
from retriever_server.encoders.sentence import SentenceEncoder, save_spec
from retriever_server.encoders.spec import EncodingSpec, self_test
from retriever_server.encoders.vectors import rows_of, similarities

_TEXTS = ["river", "The capital of a country is not always its largest city.", "one two " * 40]


def check_before(model: Any, loss: Any, spec: EncodingSpec, serves: str | None) -> None:
    """Raise unless vectors are sound, the loss scores as the index will, and a saved copy gives the same.

    serves: the folder of the index that the model is to replace; ConfigError names what differs.
    """
    check_similarity(loss, spec)
    if serves is not None:
        check_serves(spec, serves)
    training = model.training
    self_test(SentenceEncoder(model, spec))
    with tempfile.TemporaryDirectory(prefix="sleuth-check-") as folder:
        save_encoder(model, spec, Path(folder))
        check_saved(model, spec, folder)
    model.train(training)


def save_encoder(model: Any, spec: EncodingSpec, folder: Path) -> None:
    """Write the model as sentence-transformers does, and beside it the spec it was trained under."""
    model.save(str(folder), create_model_card=False)
    save_spec(replace(spec, fingerprint=fingerprint(model)), folder)


def check_saved(model: Any, spec: EncodingSpec, folder: str | Path) -> None:
    """Raise DataError unless what loads from the folder has this spec and gives the vectors of `model`."""
    loaded = load_model(str(folder), spec.kind, str(model.device))
    found = read_spec("saved", loaded, spec.passage_template, spec.inputs)
    if differences := replace(found, fingerprint=spec.fingerprint).differences(spec):
        raise DataError(f"saved and loaded again the model is another one ({differences})")
    encoders = SentenceEncoder(model, spec), SentenceEncoder(loaded, spec)
    for role in ("query", "passage"):
        here, there = (encoder.encode(_TEXTS, role) for encoder in encoders)
        least = min(
            float(similarities(rows_of(here, i), rows_of(there, i)).min()) for i in range(len(_TEXTS))
        )
        if not least > 0.99999:
            raise DataError(
                f"saved and loaded again the model gives other {role} vectors (cosine {least:.6f})"
            )


def check_similarity(loss: Any, spec: EncodingSpec) -> None:
    """Raise ConfigError where a loss scores by another similarity than the index will."""
    for each in loss.modules():
        function = getattr(each, "similarity_fct", None) or getattr(each, "similarity", None)
        name = function if isinstance(function, str) else getattr(function, "__name__", "")
        trained = next((kind for key, kind in _SIMILARITIES.items() if key in name), None)
        same = spec.normalise and {trained, spec.similarity} == {"cosine", "dot"}
        if trained not in (None, spec.similarity) and not same:
            raise ConfigError(
                f"loss: {type(each).__name__} scores by {trained}, the index that will serve by "
                f"{spec.similarity}: set init_args.similarity_fct, or normalise in the model"
            )


_SIMILARITIES = {"cos": "cosine", "dot": "dot"}


def check_serves(spec: EncodingSpec, index: str) -> None:
    """Raise ConfigError where the index that this model is to replace has another spec."""
    from retriever_server.indexes.base import read_manifest

    served = EncodingSpec(**read_manifest(Path(index)).spec)
    alike = replace(spec, fingerprint=served.fingerprint)
    if alike.hash != served.hash:
        raise ConfigError(f"serves = {index!r}: served under another spec ({alike.differences(served)})")
