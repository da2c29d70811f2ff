"""From a typed `main` to a command line: jsonargparse, with its errors in one line.

    def main(corpus: Path, k1: float = 0.9) -> None      sleuth index --corpus c.jsonl --k1 1.2
    def main(config: TrainConfig) -> None                sleuth train --algorithm.clip .2

A single dataclass parameter appears flat, its fields at top level. Every command takes
`--config FILE.yaml` (several, later ones win; options after it win over it) and `--print_config`.
"""

import argparse
import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from data.errors import ConfigError

# The docstring under a field of a configuration becomes its line in --help.
set_parsing_settings(docstring_parse_attribute_docstrings=True)

BARE_OPTIONS = {"-h", "--help", "--print_config"}  # every other option takes one value


def call(run: Callable, argv: list[str], prog: str, positional: str | None = None) -> Any:
    """What `run` returns, called with the values that argv and its configuration files give.

    positional names the option that may be given by its value alone. Raises ConfigError, in one
    line, for an unknown key, a wrong value, a file that is missing or malformed.
    """
    parser = build_parser(run, prog, positional)
    argv = name_positional(argv, positional) if positional else argv
    for path in config_paths(argv):
        check_yaml(path)
    values = parse(parser, argv)
    config_type = config_dataclass(run)
    return run(config_type(**values)) if config_type else run(**values)


def build_parser(run: Callable, prog: str, positional: str | None = None) -> ArgumentParser:
    """A parser of the parameters of `run`, or of the fields of its one dataclass."""
    note = f" {positional.upper()} needs no --{positional} before it." if positional else ""
    summary = (inspect.getdoc(run) or "").split("\n\n")[0]
    parser = ArgumentParser(prog=prog, description=summary + note, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of the keys below.")
    config_type = config_dataclass(run)
    if config_type:
        parser.add_class_arguments(config_type, None)
    else:
        parser.add_function_arguments(run, None)
    return parser


def config_dataclass(run: Callable) -> type | None:
    """The type of the only parameter of `run` if it is a dataclass, else None."""
    names = list(inspect.signature(run).parameters)
    hint = get_type_hints(run).get(names[0]) if len(names) == 1 else None
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def name_positional(argv: list[str], name: str) -> list[str]:
    """argv with its first bare value named.   [--k, 3, hi] -> [--k, 3, --name=hi]"""
    index = 0
    while index < len(argv) and argv[index].startswith("-"):
        takes_next = "=" not in argv[index] and argv[index] not in BARE_OPTIONS
        index += 2 if takes_next else 1
    if index >= len(argv):
        return argv
    return [*argv[:index], f"--{name}={argv[index]}", *argv[index + 1 :]]


def config_paths(argv: list[str]) -> list[Path]:
    """The files that argv names with --config."""
    after = [value for option, value in pairwise(argv) if option == "--config"]
    joined = [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    return [Path(value) for value in after + joined]


def check_yaml(path: Path) -> None:
    """Raise ConfigError with file and line unless path is a YAML mapping that can be read."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path}: not UTF-8 ({error})") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}, line {line}: not YAML: {error.problem}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}, line 1: keys and values are expected")


def parse(parser: ArgumentParser, argv: list[str]) -> dict[str, Any]:
    """Name -> value, dataclasses and classes built. Raises ConfigError."""
    try:
        namespace = parser.parse_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(explain(str(error), parser, argv)) from None
    check_shapes(namespace, parser, argv)
    try:
        values = dict(vars(parser.instantiate(namespace)))
    except ValueError as error:  # a check in a __post_init__
        raise ConfigError(str(error)) from error
    values.pop("config")
    return values


def check_shapes(namespace: Namespace, parser: ArgumentParser, argv: list[str]) -> None:
    """Refuse what jsonargparse lets pass: null for a type without None, a value for a group."""
    keys = known_keys(parser)
    for group in sorted({key.rpartition(".")[0] for key in keys if "." in key}, key=len):
        if not isinstance(namespace.get(group), Namespace):
            allowed = ", ".join(key for key in keys if key.startswith(f"{group}."))
            raise ConfigError(
                f"{place(group, argv)}{group}: got {namespace.get(group)!r}, allowed: {allowed}"
            )
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)  # `X | None` is no instance of type
        expected = hint.__name__ if isinstance(hint, type) else ""
        if expected and action.default is not None and namespace.get(action.dest) is None:
            where = place(action.dest, argv)
            raise ConfigError(f"{where}{action.dest}: got null, expected {expected}")


def explain(message: str, parser: ArgumentParser, argv: list[str]) -> str:
    """A message of jsonargparse as one line: where, which key, what was given, what is allowed."""
    if found := re.match(r"unrecognized arguments: --([^\s=]+)", message):
        return unknown_key(found[1], parser, argv)
    if message.startswith("unrecognized arguments: "):
        return f"{message} (a value of several words stands in quotes)"
    if found := re.match(r"(?:Group '(.+)' does not accept o|O)ption '(.+?)'(?: is|$)", message):
        return unknown_key(".".join(filter(None, found.groups())), parser, argv)
    if found := re.match(r'(?s)Parser key "(.+?)":\s+Expected an? (.+)\. Got value: (.*)', message):
        key, expected, given = found.groups()
        expected = re.sub(r"<class '(.+?)'>", r"\1", expected).replace("typing.", "")
        expected = re.sub(r"^Literal\[(.+)\]$", r"one of \1", expected)
        return f"{place(key, argv)}{key}: got {given!r}, expected {expected}"
    if found := re.match(
        r'(?s)Parser key "(.+?)":.+Subtypes: \[(.+?)\]\s+Errors:.+Given value: (.*)', message
    ):
        key, expected, given = found.groups()
        expected = re.sub(
            r"<class '(.+?)'>", r"\1", expected.replace("typing.", "").replace("NoneType", "null")
        )
        return f"{place(key, argv)}{key}: got {given!r}, expected one of {expected}"
    if found := re.match(r"the following arguments are required: (.+)", message):
        missing = ", ".join(f"--{key}" for key in found[1].split(", "))
        return f"missing: {missing} (see {parser.prog} --help)"
    return message


def unknown_key(key: str, parser: ArgumentParser, argv: list[str]) -> str:
    """The complaint about a key that is none: the closest that are, or all of a short list."""
    keys = known_keys(parser)
    close = difflib.get_close_matches(key, keys, n=2, cutoff=0.75)
    if not close and len(keys) > 12:
        hint = f"{parser.prog} --help lists them"
    else:
        hint = f"did you mean {' or '.join(close)}?" if close else f"allowed: {', '.join(keys)}"
    return f"{place(key, argv)}unknown key {key}; {hint}"


def known_keys(parser: ArgumentParser) -> list[str]:
    """The dotted keys that the parser accepts."""
    return [key for key, _ in parser.get_defaults().items() if key != "config"]


def place(key: str, argv: list[str]) -> str:
    """`file, line N: ` where a configuration file gives key; empty if the command line does."""
    if any(word.partition("=")[0] == f"--{key}" for word in argv):
        return ""
    for path in reversed(config_paths(argv)):
        node: yaml.Node | None = yaml.compose(path.read_text(encoding="utf-8"))
        line = None
        for part in key.split("."):
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            name, node = next((pair for pair in pairs if pair[0].value == part), (None, None))
            line = name.start_mark.line + 1 if name else None
        if line:
            return f"{path}, line {line}: "
    return ""
