"""The kinds of model that are trained and served, and all that depends on the kind."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Kind:
    """Names of the parts of one kind of model in sentence-transformers and in our indexes."""

    name: str
    class_name: str
    """Class of its model in sentence-transformers."""
    index: str
    """Kind of the exact index that searches its vectors; "": it makes none, but reads pairs."""
    losses: str
    """Module of sentence-transformers with the losses for it."""

    @cached_property
    def model_class(self) -> Any:
        """Its class in sentence-transformers."""
        return getattr(import_module("sentence_transformers"), self.class_name)

    @cached_property
    def trainer_class(self) -> Any:
        """Its trainer in sentence-transformers; `training_args_class` is that of its arguments."""
        return getattr(import_module("sentence_transformers"), f"{self.class_name}Trainer")


_ST = "sentence_transformers"
DENSE = Kind("dense", "SentenceTransformer", "flat", f"{_ST}.sentence_transformer.losses")
SPARSE = Kind("sparse", "SparseEncoder", "inverted", f"{_ST}.sparse_encoder.losses")
MULTI = Kind("multi", "MultiVectorEncoder", "maxsim", f"{_ST}.multi_vector_encoder.losses")
CROSS = Kind("cross", "CrossEncoder", "", f"{_ST}.cross_encoder.losses")
KINDS = {kind.name: kind for kind in (DENSE, SPARSE, MULTI, CROSS)}
ENCODERS = {name: kind for name, kind in KINDS.items() if kind.index}
"""Those that make vectors."""


def kind_of_model(model: Any) -> Kind:
    """The kind of a model of sentence-transformers."""
    names = [each.__name__ for each in type(model).__mro__]
    return next(kind for kind in KINDS.values() if kind.class_name in names)
