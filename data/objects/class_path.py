"""Objects that a file names by `class_path` and `init_args`: checked against their interface, then built.

All of a file is checked before any of it is called: that what it names is of the interface that is due
there, and takes these arguments. A file that names a class runs its module, so it is to be trusted as code.

jsonargparse checks the plain values. Its own subclass support is not used: it runs a module to look into it,
does not look beside the file, takes no text for an object, and says what is wrong over several lines.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import json
import re
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from data.errors import ConfigError, SleuthError
from data.objects.plugins import OURS, find_plugin, what_was_raised

Build = Callable[[], Any]
"""Gives an object whose description has been checked."""
TextReader = Callable[[str, str], Build]
"""Reads a text; the second argument is the place where it stands."""
_PLAIN = (Any, str, int, float, bool, bytes, dict, list, tuple, set, type, type(None), object, Path)
_VALUES = ("datetime", "decimal", "uuid")
_LISTS = (list, tuple, Sequence)


@dataclass(frozen=True)
class Plan:
    """A class or function with arguments that fit it, ready to be called."""

    make: Callable[..., Any]
    name: str
    arguments: Mapping[str, Any]
    """Values, and plans (or lists and mappings of them) where objects are due."""
    interface: tuple[type, ...]
    place: str
    """Begins its errors."""

    def __call__(self) -> Any:
        """Build its parts, then call it. What the call raises is a ConfigError in one line."""
        values = {key: _built(value) for key, value in self.arguments.items()}
        try:
            made = self.make(**values)
        except SleuthError as error:
            raise type(error)(f"{self.place}: {error}") from error
        except ModuleNotFoundError as error:
            needs = f"{self.name} needs the package {error.name}, which is not installed"
            raise ConfigError(f"{self.place}: {needs}") from error
        except Exception as error:
            if self.make.__module__.partition(".")[0] in OURS and not isinstance(error, ValueError):
                raise  # a bug of ours
            raise ConfigError(f"{self.place}: {self.name}: {what_was_raised(error)}") from error
        if not isinstance(made, self.interface):
            gave = f"gave a {type(made).__name__}, no {_names(self.interface)}"
            raise ConfigError(f"{self.place}: {self.name} {gave}")
        return made


@dataclass(frozen=True)
class Reader:
    """Reads the mappings of one kind of file. short_names: name -> module that defines it.

    texts, keys: interface, or argument -> what reads a text where such an object is due.
    given: what is handed to everything that has such a parameter.
    """

    short_names: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[type, TextReader] = field(default_factory=dict)
    keys: Mapping[str, TextReader] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)

    def plan(self, node: Any, interface: tuple[type, ...], place: str) -> Plan:
        """Return the call that a mapping describes; nothing is called. `place` begins its ConfigErrors."""
        name, arguments = parts_of(node, place)
        make = self.find(name, f"{place}class_path")
        if not self._is_own_function(make):
            check_interface(make, name, interface, f"{place}class_path")
        takes = Signature(make, name, f"{place}init_args", self.given.keys())
        takes.check_keys(arguments)
        given = {key: partial(_same, value) for key, value in self.given.items() if key in takes.parameters}
        values = {key: self._read(value, key, takes) for key, value in arguments.items()}
        takes.check_required({**given, **values})
        plain = {key: value for key, value in values.items() if value is arguments[key]}
        return Plan(make, name, {**given, **values, **takes.typed(plain)}, interface, takes.place)

    def build(self, node: Any, interface: tuple[type, ...], place: str) -> Any:
        """Return what a mapping describes, checked and built."""
        return self.plan(node, interface, place)()

    def find(self, name: str, place: str) -> Any:
        """Return what a class_path names: by a short name, or as module.name."""
        if (module := self.short_names.get(name, "")).startswith("examples."):
            return find_plugin(f"{module}.{name}", place)  # there in a checkout of the repository alone
        if module:
            return getattr(importlib.import_module(module), name)
        if "." in name:
            return find_plugin(name, place)
        close = difflib.get_close_matches(name, self.short_names, n=2)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        known = ", ".join([*self.short_names, "or module.Class"])
        raise ConfigError(f"{place}: {name!r} must be one of {known}{hint}")

    def _is_own_function(self, make: Any) -> bool:
        """Return whether it is in the table: such a function need not say what it gives."""
        return inspect.isfunction(make) and self.short_names.get(make.__name__) == make.__module__

    def _read(self, value: Any, key: str, takes: Signature) -> Any:
        """`value` itself, or with plans for the objects in it: one object or many, as the annotation says."""
        hint, place = takes.hints.get(key), f"{takes.place}.{key}"
        if key in self.keys and isinstance(value, str):
            return self.keys[key](value, place)
        if isinstance(value, list):
            read: Any = [self._read_one(each, hint, takes, f"{place}[{i}]") for i, each in enumerate(value)]
            items = read
        elif isinstance(value, Mapping) and "class_path" not in value:
            read = {
                name: self._read_one(each, hint, takes, f"{place}.{name}") for name, each in value.items()
            }
            items = list(read.values())
        else:
            read = self._read_one(value, hint, takes, place)
            items = [read] if read is not value else []
        if not any(map(callable, items)):
            return value
        kinds = {list: _LISTS, dict: (dict, Mapping)}.get(type(read), classes_in(hint))
        if not _holds(hint, kinds) or not all(map(callable, items)):
            many, due = "a list of " * _holds(hint, _LISTS), _names(classes_in(hint))
            raise ConfigError(f"{place}: expected {many or 'one '}{due}")
        return read

    def _read_one(self, value: Any, hint: Any, takes: Signature, place: str) -> Any:
        """Return a plan for a mapping with a class_path or a text that stands for an object, else `value`."""
        interface = classes_in(hint)
        if isinstance(value, Mapping) and "class_path" in value:
            if not interface:
                raise ConfigError(
                    f"{place}: the annotations of {takes.name} name no class that may stand here"
                )
            return self.plan(value, interface, f"{place}.")
        read = next((of for due, of in self.texts.items() if due in interface), None)
        return read(value, place) if read and isinstance(value, str) and not _holds(hint, (str,)) else value


class Signature:
    """The parameters of a class or function; `place` begins its errors, `hidden` are not shown in them."""

    def __init__(self, make: Callable[..., Any], name: str, place: str, hidden: Collection[str] = ()) -> None:
        self.make, self.name, self.place = make, name, place
        try:
            parameters = inspect.signature(make).parameters
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{place}: {name} does not say what it takes ({error})") from error
        if nameless := [key for key, each in parameters.items() if each.kind is each.POSITIONAL_ONLY]:
            raise ConfigError(f"{place}: {name} takes {', '.join(nameless)} by position alone")
        self._free = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        self.parameters = {key: each for key, each in parameters.items() if each.kind in named}
        self._others = set(parameters) - set(self.parameters)
        self._shown = [key for key in self.parameters if key not in hidden]
        self.hints = hints_of(make)

    def check_keys(self, arguments: Mapping[str, Any]) -> None:
        """Raise ConfigError for an argument that is no parameter, unless it is handed on to others."""
        unknown = [key for key in arguments if key not in self.parameters]
        if unknown and not self._free:
            known = ", ".join(self._shown) or "none"
            raise ConfigError(f"{self.place}.{unknown[0]}: unknown key; {self.name} takes {known}")

    def check_required(self, values: Mapping[str, Any]) -> None:
        """Raise ConfigError where a parameter without default has no value; null is none where no type is."""
        given = {key for key, value in values.items() if value is not None or key in self.hints}
        required = [key for key, each in self.parameters.items() if each.default is each.empty]
        if missing := [key for key in required if key not in given]:
            raise ConfigError(f"{self.place}: missing: {', '.join(missing)}")

    def typed(self, plain: Mapping[str, Any]) -> dict[str, Any]:
        """Values without objects in them, checked and converted by the annotations (jsonargparse)."""
        known = {key: value for key, value in plain.items() if key in self.parameters}
        for key, value in known.items():
            self._check_value(key, value)
        texts = {key: value for key, value in known.items() if not classes_in(self.hints.get(key))}
        skip = frozenset({*self._others, *self.parameters} - texts.keys())
        try:
            parser = _parser_of(self.make, skip)
            return {**plain, **{key: vars(parser.parse_object(texts))[key] for key in texts}}
        except (argparse.ArgumentError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.place}: {': '.join(filter(None, wrong_value(str(error))))}") from None

    def _check_value(self, key: str, value: Any) -> None:
        """Raise ConfigError for a null, or a value in an object's place, that the annotation does not allow.

        jsonargparse lets these pass, or takes them for the name of something to import.
        """
        hint = self.hints.get(key, Any)
        due = classes_in(hint)
        null = value is None and self.parameters[key].default is None
        if null or _fits(value, hint) or not (due or value is None):
            return
        plain = getattr(hint, "__name__", hint)
        expected = f"{_names(due)}, such as {{class_path: NAME}}" if due and due != (Callable,) else plain
        raise ConfigError(f"{self.place}.{key}: got {json.dumps(value)}, expected {expected}")


@cache
def _parser_of(make: Callable[..., Any], skip: frozenset[str]) -> Any:
    """The parser of all parameters but these, made once: it reads the docstrings of the sources."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    add: Any = parser.add_class_arguments if isinstance(make, type) else parser.add_function_arguments
    add(make, None, skip=set(skip), fail_untyped=False)
    return parser


def parts_of(node: Any, place: str) -> tuple[str, Mapping[str, Any]]:
    """class_path and init_args of a mapping that holds these and nothing else."""
    if not isinstance(node, Mapping) or not {"class_path"} <= set(node) <= {"class_path", "init_args"}:
        found = f"; found {', '.join(map(str, node))}" if isinstance(node, Mapping) else ""
        raise ConfigError(f"{place.rstrip(' .:')}: must be a mapping of class_path and init_args{found}")
    name, arguments = node["class_path"], node.get("init_args")
    arguments = {} if arguments is None else arguments
    keyed = isinstance(arguments, Mapping) and all(isinstance(key, str) for key in arguments)
    if not isinstance(name, str) or not keyed:
        raise ConfigError(f"{place}class_path must be a string, init_args a mapping")
    return name, arguments


def check_interface(make: Any, name: str, interface: tuple[type, ...], place: str) -> None:
    """Raise ConfigError unless calling `make` gives an object of the interface, as far as it says."""
    due = _names(interface)
    if isinstance(make, type):
        if not issubclass(make, interface):
            raise ConfigError(f"{place}: {name} is no {due}")
        if lacking := sorted(getattr(make, "__abstractmethods__", ())):
            raise ConfigError(f"{place}: {name} is abstract: it lacks {', '.join(lacking)}")
        return
    if not inspect.isfunction(make):
        raise ConfigError(f"{place}: {name} is no class, but a {type(make).__name__}; expected a {due}")
    gives = classes_in(hints_of(make).get("return"))
    if not gives or not all(issubclass(each, interface) for each in gives):
        says = f"is a function that does not say, by `-> ...`, that it gives a {due}"
        raise ConfigError(f"{place}: {name} {says}")


def classes_in(hint: Any) -> tuple[type, ...]:
    """Return the classes that an annotation names.   list[Retriever] | str | None -> (Retriever,)"""
    if get_origin(hint) is Callable:
        return (Callable,)  # type: ignore[return-value]
    if isinstance(hint, type) and get_origin(hint) is None:
        is_value = hint in _PLAIN or issubclass(hint, Enum) or hint.__module__ in _VALUES
        return () if is_value else (hint,)
    return tuple(dict.fromkeys(found for each in get_args(hint) for found in classes_in(each)))


def hints_of(make: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of what is called; {} where they cannot be read."""
    try:
        return get_type_hints(make.__init__ if isinstance(make, type) else make)
    except Exception:  # names that exist for type checkers alone
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value without objects in it is of the annotation as it is.   [1], list[int] -> True"""
    if isinstance(hint, types.UnionType) or get_origin(hint) is Union:
        return any(_fits(value, each) for each in get_args(hint))
    of, parts = get_origin(hint) or hint, get_args(hint) or (Any,)
    if of is Literal:
        return value in parts
    if of in (list, tuple, Sequence):
        return isinstance(value, list) and all(_fits(each, parts[0]) for each in value)
    if of in (dict, Mapping):
        return isinstance(value, dict) and all(_fits(each, parts[-1]) for each in value.values())
    return hint is Any or (isinstance(hint, type) and hint in _PLAIN and isinstance(value, hint))


def _holds(hint: Any, kinds: tuple[Any, ...]) -> bool:
    """Return whether an annotation, or a part of its union, is of one of these kinds."""
    if isinstance(hint, types.UnionType) or get_origin(hint) is Union:
        return any(_holds(each, kinds) for each in get_args(hint))
    return (get_origin(hint) or hint) in kinds


def _built(value: Any) -> Any:
    if isinstance(value, list):
        return [_built(each) for each in value]
    if isinstance(value, dict):
        return {key: _built(each) for key, each in value.items()}
    return value() if callable(value) else value  # nothing that a file holds can be called


def _same(value: Any) -> Any:
    return value


def _names(interface: tuple[type, ...]) -> str:
    return " or ".join(each.__name__ for each in interface)


def wrong_value(message: str) -> tuple[str, str]:
    """Return the key, and what is wrong with its value, of a message of jsonargparse; "" and all of others.

    'Parser key "k": Expected a <class 'int'>. Got value: many' -> ("k", "got 'many', expected int")
    """
    if found := re.match(r'(?s)Parser key "(.+?)":\s+Expected an? (.+)\. Got value: (.*)', message):
        key, expected, given = found.groups()
        expected = re.sub(r"^Literal\[(.+)\]$", r"one of \1", _plain(expected))
        return key, f"got {given!r}, expected {expected}"
    union = r'(?s)Parser key "(.+?)":.+Subtypes: \[(.+?)\]\s+Errors:.+Given value: (.*)'
    if found := re.match(union, message):
        key, expected, given = found.groups()
        expected = re.sub(r"Literal\[(.+?)\]", r"\1", _plain(expected)).replace("NoneType", "null")
        return key, f"got {given!r}, expected {'' if expected.startswith('list') else 'one of '}{expected}"
    return "", " ".join(message.split())


def _plain(expected: str) -> str:
    plain = re.sub(r"<class '(.+?)'>", r"\1", expected).replace("typing.", "")
    if plain.startswith("list"):
        return "list, such as [a, b]"
    return {"dict": "dict, such as {name: value} or {class_path: NAME}"}.get(plain, plain)
