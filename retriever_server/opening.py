"""What `--retriever` accepts, opened: the one way from a word or a YAML file to a Retriever.

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

There is no registry: the signature of the constructor is what the file may say.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, get_type_hints

from data.errors import ConfigError, SleuthError
from data.yaml_file import read_yaml
from retriever_server.retriever import Retriever

SHORT_NAMES = {
    "open_index": "retriever_server.indexes.base",  # the folder of an index, with options for opening it
    "Fuse": "retriever_server.compose",
    "Sharded": "retriever_server.compose",
    "Cached": "retriever_server.compose",
    "Rerank": "retriever_server.rerank",
    "CrossEncoder": "retriever_server.rerank",
    "YesNo": "retriever_server.rerank",
    "Remote": "retriever_server.remote",
    "Web": "retriever_server.remote",
    "Qdrant": "retriever_server.qdrant",
    "FaissFile": "retriever_server.indexes.faiss_file",
}
"""Name -> module, imported only when a file names it."""

_OPENING: ContextVar[tuple[Path, ...]] = ContextVar("files that are being opened", default=())

ALLOWED = "an http(s) URL or the folder of an index, a .yaml file, none, or random:INDEX"


def open_retriever(spec: str, deadline_seconds: float = 30.0) -> Retriever:
    """The retriever that `spec` names (see above); `deadline_seconds` is for a URL.

    Raises ConfigError in one line: file, key, what is allowed; DataError for an index that has changed.
    """
    if spec.startswith(("http://", "https://")):
        return _import("Remote", spec)(spec, deadline_seconds)
    if spec.endswith((".yaml", ".yml")):
        return _open_yaml(Path(spec))
    if spec == "none":
        return _controls().NoPassages()
    folder = spec.removeprefix("random:")
    if not Path(folder).exists():
        raise ConfigError(f"retriever {spec!r}: must be {ALLOWED}")
    index = importlib.import_module("retriever_server.indexes.base").open_index(folder)
    return index if folder == spec else _controls().RandomPassages(index.corpus)


def build(node: Any, place: str) -> Any:
    """What a {class_path, init_args} mapping describes; `place` begins its errors: "FILE: " and keys."""
    if not isinstance(node, Mapping) or not set(node) <= {"class_path", "init_args"}:
        raise ConfigError(f"{place}must be a mapping of class_path and init_args")
    name, arguments = node.get("class_path"), node.get("init_args") or {}
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise ConfigError(f"{place}class_path must be a string, init_args a mapping")
    make = _import(name, f"{place}class_path")
    hints = get_type_hints(make.__init__ if isinstance(make, type) else make)
    place = f"{place}init_args"
    built = {
        str(key): _build_value(value, hints.get(str(key)), f"{place}.{key}")
        for key, value in arguments.items()
    }
    objects = {key: value for key, value in built.items() if value is not arguments[key]}
    plain = {key: value for key, value in built.items() if key not in objects}
    values = _checked(make, name, plain, objects, place)
    for key, value in objects.items():
        if isinstance(value, list) != str(hints.get(key)).startswith("list["):
            expected = "one" if isinstance(value, list) else "a list of them"
            raise ConfigError(f"{place}.{key}: expected {expected}")
    try:
        return make(**values, **objects)
    except SleuthError as error:
        raise type(error)(f"{place}: {error}") from error
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{place}: {name} needs the package {error.name}, which is not installed"
        ) from error


def _open_yaml(path: Path) -> Retriever:
    node = read_yaml(path)
    if path.resolve() in _OPENING.get():
        raise ConfigError(f"{path}: names itself, or a file that names it")
    token = _OPENING.set((*_OPENING.get(), path.resolve()))
    try:
        return _as_retriever(build(node, f"{path}: "), path)
    finally:
        _OPENING.reset(token)


def _build_value(value: Any, hint: Any, place: str) -> Any:
    """`value` with the objects in it built: mappings with a class_path, strings where a retriever is due."""
    if isinstance(value, Mapping) and "class_path" in value:
        return build(value, f"{place}.")
    if isinstance(value, list):
        items = [_build_value(item, hint, f"{place}[{i}]") for i, item in enumerate(value)]
        return value if all(item is old for item, old in zip(items, value, strict=True)) else items
    if isinstance(value, str) and Retriever.__name__ in re.findall(r"\w+", str(hint)):
        try:
            return open_retriever(value)
        except SleuthError as error:
            raise type(error)(f"{place}: {error}") from error
    return value


def _checked(
    make: Callable, name: str, arguments: dict[str, Any], objects: Mapping[str, Any], place: str
) -> dict[str, Any]:
    """The arguments checked against the signature by jsonargparse; `objects` are built already."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parameters = inspect.signature(make).parameters.values()
    allowed = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    free = any(p.kind is p.VAR_KEYWORD for p in parameters)  # checked by whom they are handed on to
    extra = {key: value for key, value in arguments.items() if key not in allowed}
    for key in [*extra, *objects]:
        if key not in allowed and not free:
            raise ConfigError(f"{place}.{key}: unknown key; {name} takes {', '.join(allowed)}")
    add: Any = parser.add_class_arguments if isinstance(make, type) else parser.add_function_arguments
    skip = {*objects, *(p.name for p in parameters if p.name not in allowed)}
    add(make, None, skip=skip, fail_untyped=False)
    try:
        known = {key: value for key, value in arguments.items() if key in allowed}
        return dict(vars(parser.parse_object(known))) | extra
    except argparse.ArgumentError as error:
        raise ConfigError(f"{place}: {_one_line(str(error))}") from None


def _one_line(message: str) -> str:
    """What jsonargparse says, shortly.   'Parser key "k": Expected a <class 'int'>. ...' -> 'k: ...'"""
    if found := re.match(r'(?s)Parser key "(.+?)":\s+Expected an? (.+)\. Got value: (.*)', message):
        key, expected, given = found.groups()
        expected = re.sub(r"<class '(.+?)'>", r"\1", expected).replace("typing.", "")
        expected = re.sub(r"^Literal\[(.+)\]$", r"one of \1", expected)
        return f"{key}: got {given!r}, expected {expected}"
    return " ".join(message.split()).replace("the following arguments are required:", "missing:")


def _import(name: str, place: str) -> Callable[..., Any]:
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module or SHORT_NAMES[name]), attribute)
    except (ImportError, AttributeError, KeyError, ValueError) as error:
        reason = f" ({error})" if module else ""
        known = ", ".join(SHORT_NAMES)
        raise ConfigError(f"{place}: {name!r} must be one of {known}, or module.Class{reason}") from error
    if not callable(found):
        raise ConfigError(f"{place}: {name!r} is no class or function")
    return found


def _as_retriever(built: Any, path: Path) -> Retriever:
    if not isinstance(built, Retriever):
        raise ConfigError(f"{path}: class_path: {type(built).__name__} is no Retriever")
    return built


def _controls() -> Any:
    return importlib.import_module("retriever_server.controls")
