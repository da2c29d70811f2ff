"""Help in two tiers: `--help` shows the options that matter, with an example; `--help-all` shows all."""

from __future__ import annotations

from argparse import SUPPRESS
from importlib import import_module
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser

TIERS = yaml.safe_load(Path(__file__).with_name("help.yaml").read_text(encoding="utf-8"))
"""Command -> options of its short help beside the required ones, and an example."""
NAMES = {
    "preset": ("rl.algorithm.presets", "PRESETS"),
    "rewards": ("rl.algorithm.rewards", "REWARDS", "judge"),
    "protocol.name": ("agent.protocol", "PROTOCOLS"),
}
"""Option -> the module and table of the names that it knows, and more names."""
ALWAYS = ("help", "config", "print_config")
"""Options that are always shown."""


def with_tier(parser: ArgumentParser, command: str, argv: list[str]) -> list[str]:
    """Return argv with one spelling of help; put names into the help, and cut `--help` to its tier."""
    everything = "--help-all" in argv
    if not everything and not {"-h", "--help"} & set(argv):
        return argv
    tier = TIERS.get(command)
    for action in parser._actions:
        if action.dest in NAMES and isinstance(action.help, str):
            module, table, *more = NAMES[action.dest]
            action.help += f" Known: {', '.join([*getattr(import_module(module), table), *more])}."
        if tier and not everything and not (action.required or action.dest in (*ALWAYS, *tier["options"])):
            action.help = SUPPRESS
    if tier:
        rest = "" if everything else " `--help-all` lists all options."
        parser.epilog = f"Example: {tier['example']}.{rest}"
    return ["--help" if word == "--help-all" else word for word in argv]
