"""Command lines out of typed functions: jsonargparse, with its errors in one line.

    def main(corpus: Path, k1: float = 0.9) -> None      sleuth index --corpus c.jsonl --k1 1.2
    def main(config: TrainConfig) -> None                sleuth train --algorithm.clip .2

A single dataclass parameter appears flat, its fields at top level. Every command takes
`--config FILE.yaml` (several, later ones win; options after it win over it) and `--print_config`.
"""

import argparse
import dataclasses
import difflib
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import (
    ActionConfigFile,  # pyright: ignore[reportPrivateImportUsage]
    ArgumentParser,
    Namespace,
    set_parsing_settings,
)

from data.atomic import check_writable
from data.errors import ConfigError
from data.objects.class_path import wrong_value
from data.objects.plugins import looking_beside
from data.yaml_file import check_keys, read_checked, read_yaml
from scripts.tiers import with_tier

# The docstring under a field of a configuration becomes its line in --help.
set_parsing_settings(docstring_parse_attribute_docstrings=True)

HELP = {"-h", "--help", "--help-all"}
_FILES_OF_RUNS = {
    "trajectories.jsonl", "judgements.jsonl", "evaluation.json", "scores.json", "run.json", "metrics.jsonl",
    "config.yaml", "state.json", "corpus.jsonl", "manifest.json",
}  # fmt: skip
BARE_OPTIONS = {*HELP, "--print_config"}  # every other takes a value, or is a switch


def call(run: Callable, argv: list[str], prog: str, positional: str | None = None) -> Any:
    """Call `run` with the values that argv and its configuration files give.

    positional names the option that may be given by its value alone. Raises ConfigError, in one
    line, for an unknown key, a wrong value, a file that is missing or malformed.
    """
    values, config_type = arguments_of(run, argv, prog, positional), config_dataclass(run)
    with looking_beside(*config_paths(joined(argv))):
        return run(config_type(**values)) if config_type else run(**values)


def arguments_of(run: Callable, argv: list[str], prog: str, positional: str | None = None) -> dict[str, Any]:
    """Return name -> value of what `call` would give to `run`. Raises ConfigError as it does."""
    build = build_parser if HELP & {*argv} else known_parser
    parser = build(run, prog, positional)
    argv = with_tier(parser, prog.removeprefix("sleuth "), joined(argv, positional))
    for path in config_paths(argv):
        check_config(path)
    for option, _, value in (word.partition("=") for word in argv):
        if value.startswith(("{", "[")):
            with suppress(yaml.YAMLError):  # what else is wrong is said where it is parsed
                check_keys(value, option)
    values = parse(parser, argv)
    check_outputs(values)
    return values


def build_parser(run: Callable, prog: str, positional: str | None = None) -> ArgumentParser:
    """A parser of the parameters of `run`, or of the fields of its one dataclass."""
    note = f" {positional.upper()} needs no --{positional} before it." if positional else ""
    summary = (inspect.getdoc(run) or "").split("\n\n")[0]
    parser = ArgumentParser(prog=prog, description=summary + note, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ConfigFile, help="YAML file of the keys below.")
    config_type = config_dataclass(run)
    if config_type:
        parser.add_class_arguments(config_type, None)
    else:
        parser.add_function_arguments(run, None)
    return parser


known_parser = cache(build_parser)
"""The same, built once in a process that calls a command many times; not for help, which changes it."""


class ConfigFile(ActionConfigFile):
    """A configuration whose {class_path: ...} takes the place of one before it, as a whole.

    jsonargparse would take both for classes of its own and join their arguments. The fields that a preset
    sets come before what the configuration that names it says.
    """

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        given = read_yaml(values) if os.path.isfile(values) else yaml.safe_load(values)
        for key, value in given.items():
            if is_component(value) and isinstance(cfg.get(key), dict):
                cfg[key] = None
        if isinstance(preset := given.get("preset"), str) and has_preset(parser):
            from rl.algorithm.presets import preset_fields

            for key, value in preset_fields(preset).items():
                cfg[f"algorithm.{key}"] = value
        super().__call__(parser, cfg, values, option_string)


def is_component(value: Any) -> bool:
    """Return whether this is a mapping that names a class."""
    return isinstance(value, dict) and "class_path" in value


def has_preset(parser: ArgumentParser) -> bool:
    """Return whether the command knows presets."""
    return any(action.dest == "preset" for action in parser._actions)


def open_mappings(parser: ArgumentParser) -> set[str]:
    """Return the keys whose values are mappings of anything, such as a class_path and its init_args."""
    return {a.dest for a in parser._actions if getattr(a, "_typehint", None) == dict[str, Any]}


def keys_inside(argv: list[str], parser: ArgumentParser) -> tuple[list[str], dict[str, Any]]:
    """Return argv without its options inside mappings of anything, and these.

    [--model.init_args.base=tiny, --steps=3] -> [--steps=3], {model.init_args.base: tiny}
    """
    mappings, kept, inside = open_mappings(parser), list[str](), dict[str, Any]()
    for word in argv:
        option, given, text = word.partition("=")
        key = option.removeprefix("--")
        if given and "." in key and key.partition(".")[0] in mappings:
            try:
                inside[key] = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ConfigError(f"{option}: got {text!r}, which is no YAML") from error
        else:
            kept.append(word)
    return kept, inside


def changed(node: Any, keys: list[str], value: Any) -> Any:
    """Return a mapping with the value at a nested key replaced; the argument is unchanged."""
    if not keys:
        return value
    below = node if isinstance(node, dict) else {}
    return {**below, keys[0]: changed(below.get(keys[0]), keys[1:], value)}


def components_as_configs(argv: list[str], parser: ArgumentParser) -> list[str]:
    """argv with a preset, and each mapping that names a class, as a configuration of this one key."""
    mappings, out = {f"--{key}" for key in open_mappings(parser)}, []
    for word in argv:
        option, _, value = word.partition("=")
        if option == "--preset" and has_preset(parser):
            word = f"--config={json.dumps({'preset': value})}"
        with suppress(yaml.YAMLError):
            if option in mappings and is_component(found := yaml.safe_load(value)):
                word = f"--config={json.dumps({option[2:]: found})}"
        out.append(word)
    return out


def config_dataclass(run: Callable) -> type | None:
    """The type of the only parameter of `run` if it is a dataclass, else None."""
    names = list(inspect.signature(run).parameters)
    hint = get_type_hints(run).get(names[0]) if len(names) == 1 else None
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def joined(argv: Sequence[str], positional: str | None = None) -> list[str]:
    """argv with option and value in one word, and its first bare value named.

    [--resume, --k, 3, hi] -> [--resume, --k=3, --name=hi]
    """
    words, out = [*reversed(argv)], []
    while words:
        word, takes_next = words.pop(), bool(words) and words[-1] not in BARE_OPTIONS
        if not word.startswith("-") and positional:
            word, positional = f"--{positional}={word}", None
        elif word.startswith("--") and word not in BARE_OPTIONS and "=" not in word and takes_next:
            word += "" if words[-1].startswith("--") else f"={words.pop()}"
        out.append(word)
    return out


def value_flags(argv: list[str], parser: ArgumentParser) -> list[str]:
    """argv with a switch that stands alone turned on, and the words of a list in brackets.

    [--resume, --k=3, --by=a,b] -> [--resume=true, --k=3, --by=[a,b]]
    """
    hints = {f"--{action.dest}": getattr(action, "_typehint", None) for action in parser._actions}
    flags = {flag for flag, hint in hints.items() if bool in (hint, *get_args(hint))}
    spelled = {flag: flag for flag in flags} | {flag.replace("_", "-"): flag for flag in flags}
    argv = [f"{spelled[word]}=true" if word in spelled else word for word in argv]
    lists = {f for f, hint in hints.items() if list in (get_origin(hint), *map(get_origin, get_args(hint)))}
    return [re.sub("=(?!null$)([^[{].*)", r"=[\1]", w) if w.split("=")[0] in lists else w for w in argv]


def bare_words(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The values that stand for themselves, and the rest.   [a, --k, 3, b] -> [a, b], [--k=3]"""
    words = joined(argv)
    return [w for w in words if not w.startswith("-")], [w for w in words if w.startswith("-")]


def quoted(text: str) -> str:
    """The text as a string of YAML."""
    return "'" + text.replace("'", "''") + "'"


def config_paths(argv: list[str]) -> list[Path]:
    """The files that argv names with --config."""
    return [Path(word[9:]) for word in argv if word.startswith("--config=")]


def check_config(path: Path) -> None:
    """Raise ConfigError with file and line unless path is a YAML mapping that gives no key twice."""
    root = yaml.compose(read_checked(path, "--config "))
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}, line 1: keys and values are expected")
    first: dict[str, int] = {}
    for key, line in dotted_keys(root):  # a.b: 1 beside a: {b: 2}
        if key in first:
            raise ConfigError(f"{path}, line {line}: {key} is given twice, first on line {first[key]}")
        first[key] = line


def dotted_keys(node: yaml.MappingNode) -> Iterator[tuple[str, int]]:
    """The keys of a mapping and of those inside it that hold no mapping again, each with its line."""
    for key, value in node.value:
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from ((f"{key.value}.{name}", line) for name, line in dotted_keys(value))
        else:
            yield str(key.value), key.start_mark.line + 1


def with_words(argv: list[str], parser: ArgumentParser) -> list[str]:
    """argv where a word stands for a group that has a name: `--protocol compact`, `protocol: compact`.

    A group of a class_path alone gets its default name, so that jsonargparse takes it for the group it is.
    The empty `changes` that earlier versions wrote to config.yaml is left out.
    """
    defaults = option_defaults(parser).items()
    named = {key.removesuffix(".name"): name for key, name in defaults if key.endswith(".name")}

    def spelled_out(key: str, value: Any) -> Any:
        if key in named and isinstance(value, str):
            return {"name": value}
        alone = key in named and is_component(value) and value.keys() <= {"class_path", "init_args"}
        return {"name": named[key], **value} if alone else value

    words: list[str] = []
    for word in argv:
        option, _, value = word.partition("=")
        if option == "--config":
            given = read_yaml(value)
            given_keys = {key: each for key, each in given.items() if (key, each) != ("changes", {})}
            spelled = {key: spelled_out(key, each) for key, each in given_keys.items()}
            word = word if spelled == given else f"--config={json.dumps(spelled, default=str)}"
        elif option[2:] in named and value[:1] == "{":
            with suppress(yaml.YAMLError):
                word = f"{option}={json.dumps(spelled_out(option[2:], yaml.safe_load(value)))}"
        elif option[2:] in named and not value.endswith((".yaml", ".yml", ".json")):
            word = f"{option}.name={value}"
        words.append(word)
    return words


def parse(parser: ArgumentParser, argv: list[str]) -> dict[str, Any]:
    """Name -> value, dataclasses and classes built. Raises ConfigError."""
    argv, inside = keys_inside(value_flags(joined(argv), parser), parser)
    try:
        namespace = parser.parse_args(components_as_configs(with_words(argv, parser), parser))
    except argparse.ArgumentError as error:
        raise ConfigError(explain(str(error), parser, argv)) from None
    for path, value in inside.items():
        key, *keys = path.split(".")
        namespace[key] = changed(namespace[key], keys, value)
    check_shapes(namespace, parser, argv)
    try:
        values = dict(vars(parser.instantiate(namespace)))
    except ValueError as error:  # a check in a __post_init__
        raise ConfigError(str(error)) from error
    values.pop("config")
    return values


def check_outputs(values: dict[str, Any]) -> None:
    """Refuse a place to write where nothing can be written, or a file to read, also of a run.

    Raises StorageError or ConfigError before anything slow.
    """
    paths = {
        key: [
            path for each in (value if isinstance(value, list) else [value]) for path in str(each).split(",")
        ]
        for key, value in values.items()
        if isinstance(value, str | Path | list)
    }
    for out in ("out", "rest", "csv", "json", "markdown"):
        if values.get(out):
            check_writable(values[out])
        for path in filter(os.path.isfile, paths.pop(out, [])):
            of_run = os.path.basename(path) in _FILES_OF_RUNS
            inside = [path, *(map(str, Path(path).resolve().parents) if of_run else ())]
            for key, others in paths.items():
                there = filter(os.path.exists, others)
                if any(os.path.samefile(*pair) for pair in product(there, inside)):
                    raise ConfigError(
                        f"{out} = {path}: must be another file than {key}, which it would replace"
                    )


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
        return f"{message} (each value follows its --option; several words stand in quotes)"
    if found := re.match(r"(?:Group '(.+)' does not accept o|O)ption '(.+?)'(?: is|$)", message):
        return unknown_key(".".join(filter(None, found.groups())), parser, argv)
    of_class = r"""(?s)Parser key "(.+?)":\s+Problem with given class_path '(.+)\.(\w+)':\s+(.+)"""
    if found := re.match(of_class, message):  # an item of a list
        key, module, name, inner = found.groups()
        item = ArgumentParser(prog=parser.prog)
        item.add_class_arguments(getattr(import_module(module), name))
        return f"{place(key, argv)}{key}: {explain(inner, item, [])}"
    key, wrong = wrong_value(message)
    if key:
        return f"{place(key, argv)}{key}: {wrong}"
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
    return [key for key in option_defaults(parser) if key != "config"]


@cache
def option_defaults(parser: ArgumentParser) -> dict[str, Any]:
    """Dotted key -> default, found once: a tenth of a parse each time."""
    return dict(parser.get_defaults().items())


def place(key: str, argv: list[str]) -> str:
    """`file, line N: ` where a configuration file gives key; empty if the command line does."""
    if any(word.startswith(f"--{key}=") for word in argv):
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
