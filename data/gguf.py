"""GGUF files made into folders that `from_pretrained` loads, once: into a cache, whole or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

from data.atomic import make_once

CACHE = Path.home() / ".cache" / "sleuth" / "models"
"""Where converted models are kept for the next time."""


def converted_gguf(gguf: Path) -> Path:
    """The folder of the model in a GGUF file, converted the first time (half a minute for 135 M weights)."""
    status = gguf.stat()
    stamp = hashlib.sha256(f"{gguf.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()
    return make_once(CACHE / f"{gguf.stem}-{stamp[:12]}", lambda folder: convert_gguf(gguf, folder))


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
