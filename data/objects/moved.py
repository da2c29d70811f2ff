"""Modules that were renamed: files and programs of earlier versions still find them by their old names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "agent.evaluate": "agent.evaluation.evaluate",
    "agent.report": "agent.evaluation.report",
    "data.answers": "data.metrics.answers",
    "data.atlas.factbook": "examples.atlas.factbook",
    "data.benchmarks": "data.formats.benchmarks",
    "data.child": "data.machine.managed_process",
    "data.documents": "data.formats.documents",
    "data.images": "data.pages.images",
    "data.layout": "data.pages.layout",
    "data.modalities": "data.pages.modalities",
    "data.page_sources": "data.pages.page_sources",
    "data.rendering": "data.pages.rendering",
    "data.significance": "data.metrics.significance",
    "retriever_server.client": "retriever_server.client.search_client",
    "retriever_server.compose": "retriever_server.retrievers.side_by_side",
    "retriever_server.controls": "retriever_server.retrievers.baselines",
    "retriever_server.encoders.eos": "retriever_server.encoders.checks",
    "retriever_server.encoders.packing": "retriever_server.encoders.sentence",
    "retriever_server.encoders.vectors": "retriever_server.encoders.spec",
    "retriever_server.encoders.identity": "retriever_server.encoders.read_spec",
    "retriever_server.encoders.pictures": "retriever_server.encoders.image_inputs",
    "retriever_server.encoders.proofs": "retriever_server.encoders.checks",
    "retriever_server.encoders.two_way": "retriever_server.encoders.checks",
    "retriever_server.opening": "retriever_server.open_retriever",
    "retriever_server.qdrant": "examples.qdrant.qdrant",
    "retriever_server.remote": "retriever_server.retrievers.remote",
    "retriever_server.rerank": "retriever_server.retrievers.rerank",
    "retriever_server.training.decoders": "retriever_server.training.builders.dense",
    "retriever_server.training.distill": "retriever_server.training.losses.distillation",
    "retriever_server.training.info_nce": "retriever_server.training.losses.info_nce",
    "retriever_server.training.llm2vec": "retriever_server.training.losses.masked_next_token",
    "retriever_server.training.m3": "retriever_server.training.builders.m3",
    "retriever_server.training.models": "retriever_server.training.builders.dense",
    "retriever_server.training.sparse": "retriever_server.training.builders.sparse",
    "retriever_server.training.tiny": "retriever_server.training.builders.tiny",
    "retriever_server.training.tiny_vision": "retriever_server.training.builders.tiny_vision",
    "retriever_server.training.vision": "retriever_server.training.builders.vision",
    "rl.advantages": "rl.algorithm.advantages",
    "rl.algorithm": "rl.algorithm.presets",
    "rl.algorithm.judge": "agent.evaluation.judge",
    "rl.judge": "agent.evaluation.judge",
    "rl.learner": "rl.learner.learner",
    "rl.losses": "rl.algorithm.losses",
    "rl.rewards": "rl.algorithm.rewards",
    "rl.search_r1_scorer": "examples.search_r1_scorer.scorer",
    "rl.seed_policy": "examples.seed_policy.seed_policy",
    "rl.trl_bridge": "examples.trl.search_environment",
    "scripts.compile_atlas": "examples.atlas.compile",
}
"""Old module -> new one."""


_TRAINING = "retriever_server.training"
_IN_TRAINING = {
    "decoders.promptreps": "builders.promptreps.promptreps",
    "decoders.yes_no_reranker": "builders.cross_encoder.yes_no_reranker",
    "llm2vec.SimCSE": "losses.simcse.SimCSE",
    "m3.M3Loss": "losses.m3.M3Loss",
    "models.colbert": "builders.colbert.colbert",
    "models.cross_encoder": "builders.cross_encoder.cross_encoder",
    "models.dense": "builders.dense.dense",
    "models.pretrained": "builders.pretrained.pretrained",
    "models.splade": "builders.sparse.splade",
    "models.two_towers": "builders.dense.two_towers",
    "sparse.splade_loss": "losses.splade.splade_loss",
}
MOVED_CLASSES = {
    "agent.evaluate.brief": "agent.evaluation.records.brief",
    "agent.evaluate.evaluation_record": "agent.evaluation.measures.evaluation_record",
    "agent.evaluate.format_estimate": "data.metrics.significance.format_estimate",
    "agent.evaluate.paired_difference": "agent.evaluation.compare.paired_difference",
    "agent.evaluate.read_records": "agent.evaluation.records.read_records",
    "agent.evaluate.score": "agent.evaluation.scores.score",
    "retriever_server.compose.Cached": "retriever_server.retrievers.cache.Cached",
    "retriever_server.compose.Fuse": "retriever_server.retrievers.fuse.Fuse",
    "retriever_server.compose.Sharded": "retriever_server.retrievers.shard.Sharded",
    "retriever_server.remote.Web": "examples.web_search.web.Web",
    **{f"{_TRAINING}.{old}": f"{_TRAINING}.{new}" for old, new in _IN_TRAINING.items()},
}
"""Old name of a class that left the others of its module -> new one."""


def current_name(name: str) -> str:
    """Return today's name of `module.attribute`; one that never moved is returned as it is."""
    module, _, attribute = name.rpartition(".")
    moved = f"{MOVED[module]}.{attribute}" if module in MOVED else name
    return MOVED_CLASSES.get(name, moved)


class _MovedModules(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__]
        try:
            found = import_module(new)
        except ModuleNotFoundError as error:
            if error.name is None or not new.startswith(error.name):
                raise
            there = f"{module.__name__} moved to {new}, which is in Sleuth's repository"
            raise ModuleNotFoundError(there, name=module.__name__) from None
        if not any(name.startswith(f"{module.__name__}.") for name in MOVED_CLASSES):
            sys.modules[module.__name__] = found
            return

        def attribute(name: str) -> object:
            place, _, today = current_name(f"{module.__name__}.{name}").rpartition(".")
            return getattr(import_module(place), today)

        module.__dict__["__getattr__"] = attribute  # its parts went to several modules


def find_moved_modules() -> None:
    """Let Python import modules by their old names, where nothing else has the name."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())


def take_name(package: str, name: str, names: Sequence[str]) -> object:
    """Return what a module offered that is a package today: for its `__getattr__`. Raises AttributeError."""
    if name not in names:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(import_module(MOVED[package]), name)
