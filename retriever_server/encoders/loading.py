"""Models of sentence-transformers from a folder or the hub, of the kind they were saved as."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data.errors import ConfigError
from retriever_server.encoders.kinds import ENCODERS


def _saved_kind(model: str) -> str:
    """The kind that the model was saved as; dense where it does not say."""
    from sentence_transformers.util import load_file_path

    try:
        path = load_file_path(model, "config_sentence_transformers.json")
    except OSError as error:
        raise _not_loaded(model, error) from error
    saved = json.loads(Path(path).read_text()) if path else {}
    if not path and (config := load_file_path(model, "config.json")):
        names = json.loads(Path(config).read_text()).get("architectures") or []
        if any(name.endswith("ForRetrieval") for name in names):
            return "multi"  # ColPali, ColQwen2 and theirs, as transformers saves them
    if saved.get("model_type") == "ColBERT" or saved.get("similarity_fn_name") == "MaxSim":
        return "multi"  # saved by PyLate
    return next((name for name, of in ENCODERS.items() if of.class_name == saved.get("model_type")), "dense")


def check_projects(model: str) -> None:
    """Raise ConfigError where vectors of tokens would be untrained projections of a base."""
    from sentence_transformers.util import load_file_path

    if _saved_kind(model) == "multi":
        return
    for file, says in (("config.json", "HF_ColBERT"), ("modules.json", ".Dense")):
        path = load_file_path(model, file)
        if path and says in Path(path).read_text():
            return
    raise ConfigError(
        f"encoder {model!r}: kind 'multi' would put a random projection before its vectors of tokens; "
        "train one first (docs/training-retrievers.md), or take dimension: null of the recipe colbert"
    )


def load_model(model: str, kind: str | None = None, device: str = "cpu", dtype: str = "float32") -> Any:
    """Load the model of sentence-transformers by name or folder, of the kind it was saved as if None.

    Raises ConfigError.
    """
    from data.hub import find_model

    model = find_model(model, "encoder")  # at once, not after seconds of imports
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    kind = kind or _saved_kind(model)
    if kind not in ENCODERS:
        raise ConfigError(f"encoder kind {kind!r}: must be one of {', '.join(ENCODERS)}")
    try:
        loaded = ENCODERS[kind].model_class._load_with_module_classes(
            model, _own_modules(), device=device, model_kwargs={"dtype": dtype}
        )
    except ImportError as error:  # a processor that needs what we do not: torchvision, timm, ...
        raise ConfigError(f"encoder {model!r}: {' '.join(str(error).split())[:200]}") from error
    except (OSError, ValueError) as error:
        if "video processor" in str(error) and find_spec("torchvision") is None:
            raise ConfigError(f"encoder {model!r}: its processor needs the package torchvision") from error
        raise _not_loaded(model, error) from error
    if hasattr(loaded[0], "unpad_inputs"):
        loaded[0].unpad_inputs = False  # our batches are rectangles with little padding
    return loaded


def _own_modules() -> dict[str, Any]:
    """The modules of ours that a saved model may name: these alone load without trust_remote_code."""
    from retriever_server.encoders.m3 import M3Heads
    from retriever_server.encoders.patches import PatchMask
    from retriever_server.encoders.promptreps import PromptReps
    from retriever_server.encoders.token_weights import TokenWeights

    return {f"{of.__module__}.{of.__qualname__}": of for of in (TokenWeights, M3Heads, PromptReps, PatchMask)}


def _not_loaded(model: str, error: Exception) -> ConfigError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ConfigError(f"encoder {model!r}: no sentence-transformers model loads from there ({reason})")


def limit_tokens(model: Any, max_tokens: int | None) -> None:
    """Cut texts at `max_tokens` from now on; None: where the model was saved to cut them.

    Raises ConfigError above the rows of its table of positions, if it has one.
    """
    if max_tokens is None:
        return
    for name, module in model.named_modules():
        if "vision" in name or not re.search(r"\b(position_embeddings?|wpe)$", name):
            continue
        if positions := getattr(module, "num_embeddings", 0):
            offset = getattr(module, "padding_idx", None)  # RoBERTa counts from behind it
            positions -= 0 if offset is None else offset + 1
            if max_tokens > positions:
                raise ConfigError(f"max_tokens = {max_tokens}: must be <= {positions}, the model's positions")
    model.max_seq_length = max_tokens
