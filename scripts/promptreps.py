"""`sleuth promptreps`: a language model as an encoder by its next word, ready for `sleuth index`."""

from __future__ import annotations

import os
from pathlib import Path

from data.errors import ConfigError, require


def main(base: str, out: str, top_tokens: int = 128, max_tokens: int = 512, dtype: str = "float32") -> None:
    """Write OUT/dense and OUT/sparse: encoders of a language model, without training (PromptReps).

    Index a corpus with each; scripts/configs/retrievers/promptreps.yaml joins the two.

    Args:
        base: Hub name, folder or GGUF file of a language model, best one that follows instructions.
        out: Folder for the two encoders.
        top_tokens: Words' tokens kept of a text in the sparse vectors.
        max_tokens: Of the prompt and the text; what is longer is cut.
        dtype: Of the saved weights: float32 or bfloat16.
    """
    if Path(out).exists() and any(Path(out).iterdir()):
        raise ConfigError(f"--out {out}: is there, and not empty")
    require(dtype in ("float32", "bfloat16"), "dtype", dtype, "float32 or bfloat16")
    from retriever_server.training.builders.dense import check_base

    check_base(base)
    from retriever_server.training.builders.promptreps import promptreps  # imports torch

    folders = {kind: Path(out) / kind for kind in ("dense", "sparse")}
    for kind, folder in folders.items():
        model = promptreps(base, kind, top_tokens, max_tokens, dtype)  # type: ignore[arg-type]
        model.save(str(folder), create_model_card=False)
    for weights in folders["dense"].glob("*.safetensors"):  # the same: once on the disk is enough
        copy = folders["sparse"] / weights.name
        copy.unlink()
        try:
            os.link(weights, copy)
        except OSError:
            copy.write_bytes(weights.read_bytes())
    print(f"saved: {folders['dense']} and {folders['sparse']} (`sleuth index --encoder` takes each)")
