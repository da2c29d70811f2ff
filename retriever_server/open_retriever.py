"""The one way from a word or a YAML file, as `--retriever` accepts it, to a Retriever.

    http://127.0.0.1:8000    a Sleuth or Search-R1 server
    runs/atlas/index         the folder of an index
    hybrid.yaml              a class and its arguments, nested
    none                     finds nothing: the closed book
    random:runs/atlas/index  passages drawn at random from the corpus of an index

A YAML file names a class, or a function, and what its constructor takes:

    class_path: Fuse                                     # ours go by their names, others by module.Class
    init_args:
      parts: [runs/atlas/index, http://127.0.0.1:8000]   # where a retriever is due, any of the above
      rrf_k: 60

There is no registry: the signature of the constructor is what the file may say. What is not ours is looked
for beside the file, then in the working directory. All of a file is checked before any of it is opened.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

from data.errors import ConfigError, SleuthError, require
from data.models.hub import find_model
from data.objects.class_path import Build, Reader
from data.objects.plugins import looking_beside
from data.yaml_file import read_yaml
from retriever_server.retriever import Retriever

SHORT_NAMES = {
    "open_index": "retriever_server.indexes.base",  # the folder of an index, with options for opening it
    "Fuse": "retriever_server.retrievers.fuse",
    "Sharded": "retriever_server.retrievers.shard",
    "Cached": "retriever_server.retrievers.cache",
    "Rerank": "retriever_server.retrievers.rerank",
    "CrossEncoder": "retriever_server.retrievers.rerank",
    "YesNo": "retriever_server.retrievers.rerank",
    "Remote": "retriever_server.retrievers.remote",
    "Web": "examples.web_search.web",
    "Qdrant": "examples.qdrant.qdrant",
    "FaissFile": "retriever_server.indexes.faiss_file",
}
"""Name -> module, imported only when a file names it."""

_OPENING: ContextVar[tuple[Path, ...]] = ContextVar("files that are being opened", default=())

ALLOWED = "an http(s) URL or the folder of an index, a .yaml file, none, or random:INDEX"


def open_retriever(spec: str, deadline_seconds: float = 30.0) -> Retriever:
    """Return the retriever that `spec` names (see above); `deadline_seconds` is for a URL.

    Raises ConfigError in one line: file, key, what is allowed; DataError for an index that has changed.
    """
    return plan_retriever(spec, deadline_seconds)()


def plan_retriever(spec: str, deadline_seconds: float = 30.0) -> Build:
    """Return what opens the retriever, once all that `spec` names is checked; raises as `open_retriever`."""
    require(deadline_seconds > 0, "deadline_seconds", deadline_seconds, "> 0")
    if spec.startswith(("http://", "https://")):
        return partial(_ours("Remote"), spec, deadline_seconds)
    if spec.endswith((".yaml", ".yml")):
        return plan_file(Path(spec), (Retriever,))
    if spec == "none":
        return importlib.import_module("retriever_server.retrievers.baselines").NoPassages
    folder = Path(spec.removeprefix("random:"))
    if not folder.exists():
        raise ConfigError(f"retriever {spec!r}: must be {ALLOWED}")
    manifest = importlib.import_module("retriever_server.indexes.manifest").read_manifest(folder)
    if manifest.spec:
        find_model(str(manifest.spec.get("model")), f"{folder}: its encoder")
    return partial(_open_random if spec.startswith("random:") else _ours("open_index"), folder)


def check_retriever(spec: str, deadline_seconds: float = 30.0) -> None:
    """As `plan_retriever`; a server at a URL must answer, too."""
    plan = plan_retriever(spec, deadline_seconds)
    if spec.startswith(("http://", "https://")):
        remote = plan()
        try:
            remote.probe()
        finally:
            remote.close()


def plan_file(path: Path, interface: tuple[type, ...]) -> Build:
    """Check a YAML file, and return what builds the object, of the interface, that it describes."""
    if path.resolve() in _OPENING.get():
        raise ConfigError(f"{path}: names itself, or a file that names it")
    token = _OPENING.set((*_OPENING.get(), path.resolve()))
    try:
        with looking_beside(path):
            return READER.plan(read_yaml(path), interface, f"{path}: ")
    finally:
        _OPENING.reset(token)


def _ours(name: str) -> Any:
    return READER.find(name, name)


def _open_random(folder: Path) -> Retriever:
    index = _ours("open_index")(folder)
    return importlib.import_module("retriever_server.retrievers.baselines").RandomPassages(index.corpus)


def _read_text(spec: str, place: str) -> Build:
    """As `plan_retriever`; errors, those of opening too, begin with the place."""
    with _at(place):
        plan = plan_retriever(spec)

    def build() -> Retriever:
        with _at(place):
            return plan()

    return build


@contextmanager
def _at(place: str) -> Iterator[None]:
    try:
        yield
    except SleuthError as error:
        raise type(error)(f"{place}: {error}") from error


READER = Reader(SHORT_NAMES, {Retriever: _read_text})
"""Reads the YAML files of retrievers and scorers."""
