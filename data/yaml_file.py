"""YAML that a user wrote, read strictly: what is wrong is one line with file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from data.errors import ConfigError, DataError
from data.jsonl import read_text

_MERGE = "tag:yaml.org,2002:merge"


def read_yaml(path: str | Path, option: str = "") -> Any:
    """The content of a YAML file. Raises ConfigError; `option` names what gave the path, if something did."""
    return yaml.safe_load(read_checked(path, option))


def read_checked(path: str | Path, option: str = "") -> str:
    """The text of a YAML file that loads and gives no key twice. Raises as `read_yaml`."""
    try:
        text = read_text(Path(path))
    except DataError as error:
        raise ConfigError(f"{option}{error}") from None
    try:
        check_keys(text, f"{path}, line {{line}}")
        yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{path}, line {_line(error.problem_mark)}: not YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not YAML: {error}") from None
    return text


def check_keys(text: str, place: str) -> None:
    """Raise ConfigError where a mapping gives a key twice, which YAML itself lets the last one win.

    `place` begins the message and may name {line}. What `<<` merges may be given again.
    """
    loader = _Composer(text)
    loader.place = place
    loader.get_single_node()


class _Composer(yaml.SafeLoader):
    place = ""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[object, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                line, name = _line(key.start_mark), self.construct_object(key)
                if name in first:
                    before = f", first on line {first[name]}" if "{line}" in self.place else ""
                    raise ConfigError(f"{self.place.format(line=line)}: {key.value} is given twice{before}")
                first[name] = line
        return node


def _line(mark: yaml.Mark | None) -> int:
    return mark.line + 1 if mark else 1
