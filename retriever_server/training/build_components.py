"""A recipe's parts: checked before torch is imported, then built, with one line for what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from data.corpus import Corpus
from data.errors import ConfigError
from data.examples import Examples
from data.machine.device import check_device
from data.objects.class_path import Build, Reader, parts_of
from data.objects.plugins import names_in_source, parameters_in_source
from data.offsets import hash_file
from retriever_server.encoders.read_spec import read_spec
from retriever_server.encoders.spec import CROSS, KINDS, EncodingSpec, Kind
from retriever_server.training.builders.dense import check_base
from retriever_server.training.recipe import RetrieverRecipe

_BUILDERS = {
    "colbert": "colbert",
    "cross_encoder": "cross_encoder yes_no_reranker",
    "dense": "decoder dense two_towers",
    "m3": "m3",
    "pretrained": "pretrained",
    "promptreps": "promptreps",
    "sparse": "splade unicoil deepimpact",
    "vision": "dse gme colpali two_tower_pages",
}
_LOSSES = {
    "distillation": "ContrastiveDistillation WeightedInfoNCE",
    "info_nce": "Qwen3InfoNCE",
    "m3": "M3Loss",
    "masked_next_token": "MaskedNextToken",
    "simcse": "SimCSE",
    "splade": "splade_loss",
}


def _by_name(room: str, names: dict[str, str]) -> dict[str, str]:
    return {name: f"{__package__}.{room}.{module}" for module, of in names.items() for name in of.split()}


BUILDERS = _by_name("builders", _BUILDERS)
"""Builders of models by their names in a recipe, and the module of each."""
LOSSES = _by_name("losses", _LOSSES)
"""Losses of ours, beside those of sentence-transformers."""


@cache
def known_losses(kind: Kind | None = None) -> dict[str, str]:
    """Our losses, and sentence-transformers' for a kind of model; None: for all kinds. None is imported."""
    modules = [each.losses for each in ([kind] if kind else KINDS.values())]
    theirs = {name: module for module in modules for name in names_in_source(module, imported=True)}
    return LOSSES | {name: module for name, module in theirs.items() if name.endswith("Loss")}


@dataclass(frozen=True)
class Prepared:
    """The data of a recipe, read."""

    sets: list[Examples | Corpus]
    """One a set of `recipe.train`; the passages themselves where these are what is learned from."""
    inputs: dict[str, tuple[str, str]]
    """Setting -> its file and a hash of what that holds, for `RunDir`."""


def prepare(recipe: RetrieverRecipe) -> Prepared:
    """Read the data of a recipe. Raises ConfigError or DataError for all that is wrong without a model."""
    _check_names("model", recipe.model, BUILDERS)
    _check_names("loss", recipe.loss, known_losses())
    ours = recipe.model["class_path"] in BUILDERS
    for key, base in (recipe.model.get("init_args") or {}).items() if ours else ():
        if key == "base" or key.endswith("_base"):
            check_base(base, f"model.init_args.{key}")
    if recipe.device not in ("auto", "cpu"):
        check_device(recipe.device)
    if recipe.serves is not None:
        from retriever_server.indexes.manifest import read_manifest

        read_manifest(Path(recipe.serves))
    corpora = {each.corpus: Corpus(each.corpus) for each in recipe.train}
    sets = [
        Examples(each.examples, corpora[each.corpus], each.on_error)
        if each.examples
        else corpora[each.corpus]
        for each in recipe.train
    ]
    if recipe.dev.queries is not None:
        from retriever_server.training.dev import read_dev

        read_dev(recipe.dev)
        corpora |= {each: Corpus(each) for each in filter(None, [recipe.dev.corpus])}
    hashes = {path: corpus.content_hash for path, corpus in corpora.items()}
    read = {name: (path, hashes.get(path) or hash_file(Path(path))) for name, path in _files(recipe)}
    return Prepared(sets, read)


def _check_names(part: str, node: Any, known: dict[str, str]) -> None:
    """Raise ConfigError for a model or loss that is none, as far as its source tells without importing."""
    name, arguments = parts_of(node, f"{part}.")
    if name not in known:
        if "." not in name:
            Reader(known).find(name, f"{part}.class_path")
        return
    takes = parameters_in_source(known[name], name)
    for key in arguments:
        if takes is not None and key not in takes:
            shown = ", ".join(each for each in takes if each != "model")
            raise ConfigError(f"{part}.init_args.{key}: unknown key; {name} takes {shown}")


def _files(recipe: RetrieverRecipe) -> Iterator[tuple[str, str]]:
    for number, each in enumerate(recipe.train):
        yield f"train.{number}.corpus", each.corpus
        if each.examples:
            yield f"train.{number}.examples", each.examples
    for name in ("queries", "qrels", "corpus"):
        if path := getattr(recipe.dev, name):
            yield f"dev.{name}", path


@dataclass(frozen=True)
class ModelInTraining:
    """A model, and what was found out about it once, before it is trained."""

    model: Any
    """A model of sentence-transformers."""
    kind: Kind
    spec: EncodingSpec | None
    """None of a reranker."""
    reads_files: bool = False
    """True where it encodes images, or another modality beside text."""


def build_model(recipe: RetrieverRecipe) -> ModelInTraining:
    """Build the model that the recipe names, on the CPU. Raises ConfigError."""
    kinds = tuple(kind.model_class for kind in KINDS.values())
    model = Reader(BUILDERS).build(recipe.model, kinds, "model.")
    if not isinstance(model, CROSS.model_class):
        spec = read_spec("the model", model, recipe.passage_template, recipe.inputs)
        return ModelInTraining(
            model, KINDS[spec.kind], spec, not {"text", "message"}.issuperset(model.modalities)
        )
    if recipe.passage_template != "{contents}":
        raise ConfigError(f"passage_template = {recipe.passage_template!r}: a reranker reads '{{contents}}'")
    if recipe.inputs not in (None, "text"):
        raise ConfigError(f"inputs = {recipe.inputs!r}: a reranker reads no images")
    return ModelInTraining(model, CROSS, None)


def with_style(built: ModelInTraining, sets: list[Examples | Corpus]) -> ModelInTraining:
    """The model with a spec of the style that its examples' queries have; ConfigError where they have two."""
    styles = {style for each in sets if isinstance(each, Examples) for style in each.query_styles}
    if len(styles) > 1:
        raise ConfigError(f"train: several styles of queries ({', '.join(sorted(styles))}), must be one")
    spec = built.spec and replace(built.spec, **({"query_style": styles.pop()} if styles else {}))
    return replace(built, spec=spec)


def build_loss(recipe: RetrieverRecipe, built: ModelInTraining, processes: int = 1) -> Any:
    """Build the loss that the recipe names, with Matryoshka's dimensions around it if there are any.

    With several processes their passages are one another's negatives, unless init_args say otherwise.
    """
    from torch import nn

    model, kind = built.model, built.kind
    given = {"model": model, **({"gather_across_devices": True} if processes > 1 else {})}
    reader = Reader(known_losses(kind), keys={"similarity_fct": _similarity}, given=given)
    loss = reader.build(recipe.loss, (nn.Module,), "loss.")
    if not recipe.matryoshka:
        return loss
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

    if kind.name != "dense":
        raise ConfigError(f"matryoshka = {recipe.matryoshka}: a {kind.name} model's vectors cannot be cut")
    full = model.get_embedding_dimension()
    if max(recipe.matryoshka) > full:
        raise ConfigError(f"matryoshka = {recipe.matryoshka}: must be <= {full}, the model's dimensions")
    return MatryoshkaLoss(model, loss, sorted({full, *recipe.matryoshka}, reverse=True))


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
