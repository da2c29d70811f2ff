"""Checks of a recipe before torch is imported: model, loss, data, and the index that is to be replaced."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.corpus import Corpus
from data.device import check_device
from data.examples import Examples
from retriever_server.indexes.base import read_manifest
from retriever_server.training.build_components import check_names
from retriever_server.training.builders.base import check_base
from retriever_server.training.recipe import RetrieverRecipe


@dataclass(frozen=True)
class Prepared:
    """The data of a recipe, read."""

    sets: list[Examples | Corpus]
    """One a set of `recipe.train`; the passages themselves where these are what is learned from."""
    inputs: dict[str, tuple[str, str]]
    """Setting -> its file and a hash of what that holds, for `RunDir`."""


def prepare(recipe: RetrieverRecipe) -> Prepared:
    """Read the data of a recipe. Raises ConfigError or DataError for all that is wrong without a model."""
    check_names(recipe)
    arguments = recipe.model.get("init_args") or {}
    for base in (value for key, value in arguments.items() if key == "base" or key.endswith("_base")):
        check_base(base)
    check_device(recipe.device)
    if recipe.serves is not None:
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
    return Prepared(sets, {name: (path, hashes.get(path) or _hash(path)) for name, path in _files(recipe)})


def _files(recipe: RetrieverRecipe) -> Iterator[tuple[str, str]]:
    for number, each in enumerate(recipe.train):
        yield f"train.{number}.corpus", each.corpus
        if each.examples:
            yield f"train.{number}.examples", each.examples
    for name in ("queries", "qrels", "corpus"):
        if path := getattr(recipe.dev, name):
            yield f"dev.{name}", path


def _hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
