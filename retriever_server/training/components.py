"""From class_path and init_args to a model and its loss, with one line for what is wrong with them."""

from __future__ import annotations

from functools import cache
from typing import Any

from data.class_path import Build, Reader, parts_of
from data.errors import ConfigError
from data.plugins import names_in_source, parameters_in_source
from retriever_server.training.recipe import RetrieverRecipe

_OURS = ("models", "vision", "sparse", "decoders", "distill", "info_nce", "m3", "llm2vec")
_LOSSES = {
    "dense": "sentence_transformers.sentence_transformer.losses",
    "sparse": "sentence_transformers.sparse_encoder.losses",
    "multi": "sentence_transformers.multi_vector_encoder.losses",
    "cross": "sentence_transformers.cross_encoder.losses",
}
_PARTS = {"resolve_base", "check_base", "maxsim_scores"}
"""Of builders and losses: no recipe names them."""
KINDS = {"SentenceTransformer": "dense", "SparseEncoder": "sparse", "MultiVectorEncoder": "multi"}
KINDS |= {"CrossEncoder": "cross"}


def kind_of(model: Any) -> str:
    """dense, sparse, multi or cross: what kind of sentence-transformers model this is."""
    names = [each.__name__ for each in type(model).__mro__]
    return next(kind for name, kind in KINDS.items() if name in names)


def build_model(recipe: RetrieverRecipe) -> Any:
    """The model that the recipe names, on the CPU. Raises ConfigError."""
    import sentence_transformers

    kinds = tuple(getattr(sentence_transformers, name) for name in KINDS)
    return Reader(builders()).plan(recipe.model, kinds, "model.")()


def build_loss(recipe: RetrieverRecipe, model: Any, processes: int = 1) -> Any:
    """The loss that the recipe names, with Matryoshka's dimensions around it if there are any.

    With several processes their passages are one another's negatives, unless init_args say otherwise.
    """
    from torch import nn

    given = {"model": model, **({"gather_across_devices": True} if processes > 1 else {})}
    reader = Reader(losses(kind_of(model)), keys={"similarity_fct": _similarity}, given=given)
    loss = reader.plan(recipe.loss, (nn.Module,), "loss.")()
    if not recipe.matryoshka:
        return loss
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

    if kind_of(model) != "dense":
        raise ConfigError(f"matryoshka = {recipe.matryoshka}: a {kind_of(model)} model has no prefixes")
    full = model.get_embedding_dimension()
    if max(recipe.matryoshka) > full:
        raise ConfigError(f"matryoshka = {recipe.matryoshka}: the model's vectors have {full} dimensions")
    return MatryoshkaLoss(model, loss, sorted({full, *recipe.matryoshka}, reverse=True))


def check_names(recipe: RetrieverRecipe) -> None:
    """Raise ConfigError for a model or loss that is none, as far as their source tells without importing."""
    for part, node, known in (("model", recipe.model, builders()), ("loss", recipe.loss, losses())):
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
def builders() -> dict[str, str]:
    """Our builders of models by name, and the module of each; nothing is imported."""
    return _ours("base")


@cache
def losses(kind: str | None = None) -> dict[str, str]:
    """Our losses, and sentence-transformers' for a kind of model, likewise; None: for all kinds."""
    modules = [_LOSSES[kind]] if kind else _LOSSES.values()
    theirs = {name: module for module in modules for name in names_in_source(module, imported=True)}
    return _ours("model") | {name: module for name, module in theirs.items() if name.endswith("Loss")}


def _ours(first: str) -> dict[str, str]:
    """Public names of ours whose first parameter is called so, and their modules."""
    modules = [f"retriever_server.training.{name}" for name in _OURS]
    names = [(name, module) for module in modules for name in names_in_source(module)]
    return {
        name: module
        for name, module in names
        if not name.startswith("_")
        and name not in _PARTS
        and (parameters_in_source(module, name) or [""])[0] == first
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
