"""From class_path and init_args to a model and its loss, with one line for what is wrong with them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data.errors import ConfigError, SleuthError
from retriever_server.training.recipe import RetrieverRecipe

_OURS = ("models", "vision", "sparse", "decoders", "distill", "info_nce", "m3", "llm2vec")
_LOSSES = {
    "dense": "sentence_transformers.sentence_transformer.losses",
    "sparse": "sentence_transformers.sparse_encoder.losses",
    "multi": "sentence_transformers.multi_vector_encoder.losses",
    "cross": "sentence_transformers.cross_encoder.losses",
}
KINDS = {"SentenceTransformer": "dense", "SparseEncoder": "sparse", "MultiVectorEncoder": "multi"}
KINDS |= {"CrossEncoder": "cross"}


def kind_of(model: Any) -> str:
    """dense, sparse, multi or cross: what kind of sentence-transformers model this is."""
    names = [each.__name__ for each in type(model).__mro__]
    return next(kind for name, kind in KINDS.items() if name in names)


def build_model(recipe: RetrieverRecipe) -> Any:
    """The model that the recipe names, on the CPU. Raises ConfigError."""
    make = _find(_parts(recipe.model, "model")[0], _our_modules(), "model")
    model = _call(make, recipe.model, {}, "model", _our_modules())
    if not any(each.__name__ in KINDS for each in type(model).__mro__):
        raise ConfigError(f"model.class_path {recipe.model['class_path']!r}: gives no model to train")
    return model


def build_loss(recipe: RetrieverRecipe, model: Any, processes: int = 1) -> Any:
    """The loss that the recipe names, with Matryoshka's dimensions around it if there are any.

    With several processes their passages are one another's negatives, unless init_args say otherwise.
    """
    modules = [*_our_modules(), _LOSSES[kind_of(model)]]
    given = {"model": model, **({"gather_across_devices": True} if processes > 1 else {})}
    make = _find(_parts(recipe.loss, "loss")[0], modules, "loss")
    loss = _call(make, recipe.loss, given, "loss", modules)
    if not recipe.matryoshka:
        return loss
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

    if kind_of(model) != "dense":
        raise ConfigError(f"matryoshka = {recipe.matryoshka}: a {kind_of(model)} model has no prefixes")
    full = model.get_embedding_dimension()
    if max(recipe.matryoshka) > full:
        raise ConfigError(f"matryoshka = {recipe.matryoshka}: the model's vectors have {full} dimensions")
    return MatryoshkaLoss(model, loss, sorted({full, *recipe.matryoshka}, reverse=True))


def _our_modules() -> list[str]:
    return [f"retriever_server.training.{name}" for name in _OURS]


def _find(name: str, modules: Sequence[str], place: str) -> Callable[..., Any]:
    module, _, attribute = name.rpartition(".")
    for candidate in [module] if module else modules:
        try:
            found = getattr(importlib.import_module(candidate), attribute, None)
        except ModuleNotFoundError as error:
            if module:
                raise ConfigError(f"{place}.class_path {name!r}: {error}") from error
            continue
        if callable(found) and not attribute.startswith("_"):
            return found
    known = sorted({each for module_name in {modules[-1], modules[0]} for each in _public(module_name)})
    raise ConfigError(f"{place}.class_path {name!r}: must be module.name, or one of {', '.join(known)}")


def _public(module_name: str) -> list[str]:
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError:
        return []
    defined = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module_name and name != "resolve_base"
    ]  # fmt: skip
    return [name for name in defined if not name.startswith("_")]


def _call(
    make: Callable[..., Any],
    component: Mapping[str, Any],
    given: Mapping[str, Any],
    place: str,
    modules: Sequence[str],
) -> Any:
    """`make` called with its init_args, whose own class_paths are built, and those of `given` it takes."""
    name, arguments = _parts(component, place)
    parameters = inspect.signature(make).parameters
    free = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    named = {key: p for key, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    allowed = list(named)
    place = f"{place}.init_args"
    for key in arguments:
        if key not in allowed and not free:
            takes = ", ".join(key for key in allowed if key != "model")
            raise ConfigError(f"{place}.{key}: unknown key; {name} takes {takes}")
    values = {key: value for key, value in given.items() if key in allowed}
    for key, value in arguments.items():
        values[key] = _value(value, given, f"{place}.{key}", modules)
    missing = [key for key, each in named.items() if key not in values and each.default is each.empty]
    if missing:
        raise ConfigError(f"{place}: missing: {', '.join(missing)}")
    try:
        return make(**values)
    except SleuthError as error:
        raise type(error)(f"{place}: {error}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{place}: {name}: {str(error).strip().partition(chr(10))[0]}") from error


def _value(value: Any, given: Mapping[str, Any], place: str, modules: Sequence[str]) -> Any:
    if isinstance(value, Mapping) and "class_path" in value:
        make = _find(str(value["class_path"]), modules, place)
        return _call(make, value, given, place, modules)
    if place.endswith(".similarity_fct"):
        from sentence_transformers import util
        from sentence_transformers.multi_vector_encoder.scoring import colbert_scores, mean_colbert_scores

        functions = {"cosine": util.cos_sim, "dot": util.dot_score}
        functions |= {"maxsim": colbert_scores, "mean_maxsim": mean_colbert_scores}  # over a query's tokens
        if value not in functions:
            raise ConfigError(f"{place}: got {value!r}; must be one of {', '.join(functions)}")
        return functions[value]
    return value


def _parts(component: Mapping[str, Any], place: str) -> tuple[str, Mapping[str, Any]]:
    if not {"class_path"} <= set(component) <= {"class_path", "init_args"}:
        raise ConfigError(f"{place}: must be a mapping of class_path and init_args")
    return str(component["class_path"]), component.get("init_args") or {}
