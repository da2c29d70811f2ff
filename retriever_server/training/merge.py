"""Spherical linear interpolation of checkpoints: several trainings of one base in one model (slerp)."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.atomic import new_folder
from data.errors import ConfigError, DataError, require
from retriever_server.encoders.loading import SPEC_FILE, load_model, save_spec, saved_spec
from retriever_server.encoders.read_spec import fingerprint

if TYPE_CHECKING:
    from torch import Tensor

_NEARLY_PARALLEL = 0.9995  # beyond, the sine of the angle is too small to divide by: interpolate on the line


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The point at share `t` of the way from tensor `a` to `b`, along the great circle between them.

    As one vector each, in float32; t = 0 gives a, t = 1 gives b. [1, 0], [0, 1], .5 -> [.707, .707]
    """
    x, y = a.float(), b.float()
    cosine = (x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-12)
    if cosine.abs() > _NEARLY_PARALLEL or not cosine.isfinite() or t in (0, 1):
        return ((1 - t) * x + t * y).to(a.dtype)
    angle = cosine.arccos()
    parts = ((1 - t) * angle).sin() * x + (t * angle).sin() * y
    return (parts / angle.sin()).to(a.dtype)


def merge(models: list[str], out: str, weights: list[float] | None = None) -> None:
    """Write the folder `out`: the first model's, with the weights of all of them merged by slerp.

    models: folders of the same model, trained differently (anything saved as safetensors: dense, sparse,
    multi-vector, rerankers, language models). weights: one a model, all equal if None. More than two are
    taken in one after the other, each by its share of the weight so far. Raises ConfigError for what
    cannot be merged, DataError for a folder that is none.
    """
    shares = _checked(models, out, weights)
    first, *others = map(Path, models)
    files = _weights(first)
    _check_alike(first, others, files)
    with new_folder(Path(out)) as merged:
        shutil.copytree(first, merged, ignore=partial(_skipped, first), dirs_exist_ok=True)
        for file in files:
            _merge_file(file, [first, *others], merged, shares)
        for spec in _specs(merged):
            _sign(merged / spec.parent)
        record = {"format_version": 1, "method": "slerp", "models": models, "weights": shares}
        (merged / "merged.json").write_text(json.dumps(record, indent=2))


def _checked(models: list[str], out: str, weights: list[float] | None) -> list[float]:
    shares = weights if weights is not None else [1.0] * len(models)
    if len(models) < 2 or len(shares) != len(models) or not all(0 < share < math.inf for share in shares):
        given = f"{len(models)} models, weights = {weights}"
        raise ConfigError(f"{given}: must be two or more, each with a weight above 0")
    require(not Path(out).is_file(), "out", out, "a folder, not a file")
    if Path(out).exists() and any(Path(out).iterdir()):
        raise ConfigError(f"out = {out!r}: is there, and not empty")
    for model in models:
        if not Path(model).is_dir():
            raise ConfigError(f"model {model!r}: no such folder")
        if any(Path(model).rglob("adapter_config.json")):
            raise ConfigError(f"{model}: holds an adapter; merge it into its base first")
    return [float(share) for share in shares]


def _weights(folder: Path) -> list[Path]:
    """The files of weights within a model's folder, checkpoints of its training left out."""
    found = [path.relative_to(folder) for path in sorted(folder.rglob("*.safetensors"))]
    if not found:
        raise DataError(f"{folder}: holds no *.safetensors")
    return [path for path in found if not path.parts[0].startswith("checkpoint")]


def _skipped(first: Path, folder: Any, names: list[str]) -> set[str]:
    top = Path(folder) == first
    return {n for n in names if n.endswith(".safetensors") or (top and n.startswith("checkpoint"))}


def _check_alike(first: Path, others: list[Path], files: list[Path]) -> None:
    for other in others:
        if _weights(other) != files:
            raise ConfigError(f"{other}: has other files of weights than {first}")
        here, there = _settings(first), _settings(other)
        if odd := sorted(name for name in {*here, *there} if here.get(name) != there.get(name)):
            raise ConfigError(f"{other}: has another {odd[0]} than {first}: not the same model")
        for spec in {*_specs(first), *_specs(other)}:
            here, there = (saved_spec(str((model / spec).parent)) for model in (first, other))
            if here is None or there is None:
                raise ConfigError(f"{first} and {other}: only one of them has {spec}: not trained alike")
            if differences := there.differences(here, but=["fingerprint"]):
                raise ConfigError(f"{other}: trained under another spec than {first} ({differences})")
        for file in files:
            if _shapes(first / file) != _shapes(other / file):
                raise ConfigError(f"{other / file}: has weights of other names or shapes than {first / file}")


def _specs(folder: Path) -> list[Path]:
    """The specs of the encoders within a model's folder: its own, and those of its parts (BGE-M3)."""
    return [path.relative_to(folder) for path in sorted(folder.rglob(SPEC_FILE))]


def _sign(encoder: Path) -> None:
    """Put the fingerprint of the merged weights into the spec of an encoder, which an index checks."""
    spec = saved_spec(str(encoder))
    assert spec is not None
    save_spec(replace(spec, fingerprint=fingerprint(load_model(str(encoder)))), encoder)


def _settings(folder: Path) -> dict[str, Any]:
    """Read what decides besides the weights: modules, their settings, prompts, tokenizer; by file's name."""
    names = ("modules.json", "tokenizer.json", "config_sentence_transformers.json", "*_*/**/config.json")
    files = (path for name in names for path in folder.glob(name))
    found = {str(path.relative_to(folder)): json.loads(path.read_text("utf-8")) for path in files}
    found.get("config_sentence_transformers.json", {}).pop("__version__", None)
    for passing in ("padding", "truncation"):  # as they were used last
        found.get("tokenizer.json", {}).pop(passing, None)
    return found


def _shapes(file: Path) -> dict[str, list[int]]:
    opened = _open(file)
    return {name: opened.get_slice(name).get_shape() for name in sorted(opened.keys())}


def _open(file: Path) -> Any:
    from safetensors import safe_open

    return safe_open(file, "pt")


def _merge_file(file: Path, models: list[Path], out: Path, shares: list[float]) -> None:
    from safetensors.torch import save_file

    first, *others = (_open(model / file) for model in models)
    merged = {}
    for name in list(first.keys()):
        so_far, total = first.get_tensor(name), shares[0]
        for other, share in zip(others, shares[1:], strict=True):
            total += share
            if so_far.is_floating_point():
                so_far = slerp(so_far, other.get_tensor(name), share / total)
        merged[name] = so_far.contiguous()
    save_file(merged, out / file, metadata=first.metadata())
