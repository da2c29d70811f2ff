"""The folder of a model that serves, and the proof that what is trained is what will serve."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.atomic import new_folder
from data.checkpoint import saving
from data.errors import ConfigError, DataError
from retriever_server.encoders.checks import self_test
from retriever_server.encoders.loading import load_model, save_spec
from retriever_server.encoders.read_spec import fingerprint, read_spec
from retriever_server.encoders.sentence import SentenceEncoder
from retriever_server.encoders.spec import EncodingSpec


def check_before(model: Any, loss: Any, spec: EncodingSpec, serves: str | None) -> None:
    """Raise unless vectors are sound, the loss scores as the index will, and a saved copy gives the same.

    serves: the folder of the index that the model is to replace; ConfigError names what differs.
    """
    check_similarity(loss, spec)
    if serves is not None:
        _check_serves(spec, serves)
    training = model.training
    with tempfile.TemporaryDirectory(prefix="sleuth-check-") as folder:
        with saving(f"cannot save a copy to check in {folder}"):
            model.save(folder, create_model_card=False)
        check_saved(model, spec, folder)
    model.train(training)


def export(model: Any, spec: EncodingSpec | None, folder: Path) -> Path:
    """Write the model that serves, adapters merged, to `folder`, whole or not at all; it is loaded once.

    Raises DataError where what loads from there gives other vectors, StorageError where the disk refuses.
    """
    merge_adapters(model)
    model.eval()
    with saving(f"cannot save the model {folder}"), new_folder(folder) as partial:
        if spec is None:
            model.save_pretrained(str(partial), create_model_card=False)
            return folder
        save_encoder(model, spec, partial)
        check_saved(model, spec, partial)
        for name, part in getattr(model[-1], "parts", lambda _: {})(model).items():  # M3 is three encoders
            of = read_spec(name, part, spec.passage_template, spec.inputs)
            save_encoder(part, replace(of, query_style=spec.query_style), partial / name)
    return folder


def save_encoder(model: Any, spec: EncodingSpec, folder: Path) -> None:
    """Write the model as sentence-transformers does, and beside it the spec it was trained under."""
    model.save(str(folder), create_model_card=False)
    save_spec(replace(spec, fingerprint=fingerprint(model)), folder)


def check_saved(model: Any, spec: EncodingSpec, folder: str | Path) -> None:
    """Raise DataError unless what loads from the folder has this spec and gives the vectors of `model`."""
    loaded = load_model(str(folder), spec.kind, str(model.device))
    found = read_spec(str(folder), loaded, spec.passage_template, spec.inputs)
    if differences := found.differences(spec, but=["fingerprint", "query_style"]):
        raise DataError(f"saved and loaded again the model is another one ({differences})")
    self_test(SentenceEncoder(loaded, found), like=SentenceEncoder(model, spec))


def check_similarity(loss: Any, spec: EncodingSpec) -> None:
    """Raise ConfigError where a loss scores by another similarity than the index will."""
    for each in loss.modules():
        function = getattr(each, "similarity_fct", None) or getattr(each, "similarity", None)
        name = function if isinstance(function, str) else getattr(function, "__name__", "")
        trained = "cosine" if "cos" in name else "dot" if "dot" in name else spec.similarity
        same = spec.normalise and {trained, spec.similarity} == {"cosine", "dot"}
        if trained != spec.similarity and not same:
            raise ConfigError(
                f"loss: {type(each).__name__} scores by {trained}, the index that will serve by "
                f"{spec.similarity}: set init_args.similarity_fct, or normalise in the model"
            )


def _check_serves(spec: EncodingSpec, index: str) -> None:
    """Raise ConfigError where the index that this model is to replace has another spec."""
    from retriever_server.indexes.manifest import read_manifest

    served = EncodingSpec(**read_manifest(Path(index)).spec)
    if differences := spec.differences(served, but=["fingerprint"]):
        raise ConfigError(f"serves = {index!r}: its model has another encoding spec ({differences})")


def merge_adapters(model: Any) -> None:
    """Add what LoRA adapters have learned to the weights they stand beside, and take them away."""
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "lora_A"):  # peft's own class, which is not imported to find out
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
