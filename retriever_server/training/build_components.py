"""From class_path and init_args to a model and its loss, with one line for what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pkgutil import iter_modules
from typing import Any

from data.class_path import Build, Reader, parts_of
from data.errors import ConfigError
from data.plugins import names_in_source, parameters_in_source
from retriever_server.encoders.image_inputs import reads_files
from retriever_server.encoders.kinds import CROSS, KINDS, Kind, kind_of_model
from retriever_server.encoders.read_spec import read_spec
from retriever_server.encoders.spec import EncodingSpec
from retriever_server.training import builders, losses
from retriever_server.training.recipe import RetrieverRecipe


@dataclass(frozen=True)
class ModelInTraining:
    """A model, and what was found out about it once, before it is trained."""

    model: Any
    """A model of sentence-transformers."""
    kind: Kind
    spec: EncodingSpec | None
    """None of a reranker."""
    reads_files: bool = False
    """Whether it encodes images, or another modality beside text."""


def build_model(recipe: RetrieverRecipe) -> ModelInTraining:
    """Build the model that the recipe names, on the CPU. Raises ConfigError."""
    kinds = tuple(kind.model_class for kind in KINDS.values())
    model = Reader(known_builders()).plan(recipe.model, kinds, "model.")()
    if kind_of_model(model) is not CROSS:
        spec = read_spec("the model", model, recipe.passage_template, recipe.inputs)
        return ModelInTraining(model, kind_of_model(model), spec, reads_files(model))
    if recipe.passage_template != "{contents}":
        raise ConfigError(f"passage_template = {recipe.passage_template!r}: a reranker reads '{{contents}}'")
    if recipe.inputs not in (None, "text"):
        raise ConfigError(f"inputs = {recipe.inputs!r}: a reranker reads no images")
    return ModelInTraining(model, CROSS, None)


def build_loss(recipe: RetrieverRecipe, model: Any, processes: int = 1) -> Any:
    """Build the loss that the recipe names, with Matryoshka's dimensions around it if there are any.

    With several processes their passages are one another's negatives, unless init_args say otherwise.
    """
    from torch import nn

    kind = kind_of_model(model)
    given = {"model": model, **({"gather_across_devices": True} if processes > 1 else {})}
    reader = Reader(known_losses(kind), keys={"similarity_fct": _similarity}, given=given)
    loss = reader.plan(recipe.loss, (nn.Module,), "loss.")()
    if not recipe.matryoshka:
        return loss
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

    if kind.name != "dense":
        raise ConfigError(f"matryoshka = {recipe.matryoshka}: a {kind.name} model has no prefixes")
    full = model.get_embedding_dimension()
    if max(recipe.matryoshka) > full:
        raise ConfigError(f"matryoshka = {recipe.matryoshka}: the model's vectors have {full} dimensions")
    return MatryoshkaLoss(model, loss, sorted({full, *recipe.matryoshka}, reverse=True))


def check_names(recipe: RetrieverRecipe) -> None:
    """Raise ConfigError for a model or loss that is none, as far as their source tells without importing."""
    nodes = (("model", recipe.model, known_builders()), ("loss", recipe.loss, known_losses()))
    for part, node, known in nodes:
        name, arguments = parts_of(node, f"{part}.")
        if name not in known:
            if "." not in name:
                Reader(known).find(name, f"{part}.class_path")
            continue
        takes = parameters_in_source(known[name], name)
        for key in arguments:
            if takes is not None and key not in takes:
                shown = ", ".join(each for each in takes if each != "model")
                raise ConfigError(f"{part}.init_args.{key}: unknown key; {name} takes {shown}")


@cache
def known_builders() -> dict[str, str]:
    """Our builders of models by name, and the module of each; nothing is imported."""
    return _names_in(builders, "base")


@cache
def known_losses(kind: Kind | None = None) -> dict[str, str]:
    """Our losses, and sentence-transformers' for a kind of model, likewise; None: for all kinds."""
    modules = [each.losses for each in ([kind] if kind else KINDS.values())]
    theirs = {name: module for module in modules for name in names_in_source(module, imported=True)}
    return _names_in(losses, "model") | {n: module for n, module in theirs.items() if n.endswith("Loss")}


def _names_in(package: Any, first: str) -> dict[str, str]:
    """Public functions and classes of a package's modules whose first parameter is called so."""
    modules = [f"{package.__name__}.{each.name}" for each in iter_modules(package.__path__)]
    found = ((name, each) for each in modules if not each.endswith(".base") for name in names_in_source(each))
    return {
        name: module
        for name, module in found
        if not name.startswith("_") and (parameters_in_source(module, name) or [""])[0] == first
    }


def _similarity(name: str, place: str) -> Build:
    def build() -> Any:
        from sentence_transformers import util
        from sentence_transformers.multi_vector_encoder.scoring import colbert_scores, mean_colbert_scores

        functions = {"cosine": util.cos_sim, "dot": util.dot_score}
        return (functions | {"maxsim": colbert_scores, "mean_maxsim": mean_colbert_scores})[name]

    known = ("cosine", "dot", "maxsim", "mean_maxsim")  # the last two over a query's tokens
    if name not in known:
        raise ConfigError(f"{place}: got {name!r}; must be one of {', '.join(known)}")
    return build
