"""Help in two tiers: `--help` shows the options that matter, with an example; `--help-all` shows all."""

from __future__ import annotations

from argparse import SUPPRESS
from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import ArgumentParser


class Tier(NamedTuple):
    """Short help of a command: these options beside the required ones, and an example."""

    options: Collection[str]
    example: str


_HELP = yaml.safe_load(Path(__file__).with_name("help.yaml").read_text(encoding="utf-8"))
TIERS = {command: Tier(**shown) for command, shown in _HELP.items()}

NAMES = {
    "preset": ("rl.algorithm.presets", "PRESETS"),
    "rewards": ("rl.algorithm.rewards", "REWARDS", "judge"),
    "protocol.name": ("agent.protocol", "PROTOCOLS"),
}
"""Option -> the module and table of the names that it knows, and more names."""


def with_tier(parser: ArgumentParser, command: str, argv: list[str]) -> list[str]:
    """Return argv with one spelling of help; put names into the help, and cut `--help` to its tier."""
    everything = "--help-all" in argv
    if not everything and not {"-h", "--help"} & set(argv):
        return argv
    tier = TIERS.get(command)
    for action in parser._actions:
        if action.dest in NAMES and isinstance(action.help, str):
            action.help += f" Known: {', '.join(_known(*NAMES[action.dest]))}."
        if tier and not everything and not _matters(action, tier):
            action.help = SUPPRESS
    if tier:
        rest = "" if everything else " `--help-all` lists all options."
        parser.epilog = f"Example: {tier.example}.{rest}"
    return ["--help" if word == "--help-all" else word for word in argv]


def _known(module: str, table: str, *more: str) -> list[str]:
    return [*getattr(import_module(module), table), *more]


def _matters(action: Any, tier: Tier) -> bool:
    return action.required or action.dest in ("help", "config", "print_config", *tier.options)
