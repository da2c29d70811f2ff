"""A device that a user names: judged without torch, which takes seconds to import, then by torch."""

from __future__ import annotations

import ctypes
import logging
import os
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from data.errors import require

logger = logging.getLogger(__name__)


def check_device(device: str) -> None:
    """Raise ConfigError for a device that this machine surely lacks; torch has the last word.

    "cuda:0" without a driver or with a torch for CPUs -> ConfigError; "cpu", "auto" -> nothing
    """
    kind = device.partition(":")[0]
    require(kind in ("auto", "cpu", "cuda", "mps"), "device", device, "auto, cpu or cuda")
    there = kind != "cuda" or not _lacks_cuda()
    require(there, "device", device, "cpu or auto, as there is no CUDA device here")


def choose_dtype(dtype: str, device: str) -> str:
    """Return the type to compute in: auto is bfloat16 on cuda, else float32.

    Warns of bfloat16 where the CPU only emulates it: with AVX2 alone, a product takes 50 times as long.
    """
    import torch

    chosen = ("bfloat16" if device.startswith("cuda") else "float32") if dtype == "auto" else dtype
    if chosen == "bfloat16" and device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        logger.warning("bfloat16: this CPU only emulates it, many times slower than float32")
    return chosen


def cpu_has_bfloat16() -> bool:
    """Return whether the CPU has instructions for bfloat16, with which it is twice as fast as float32.

    mkldnn also takes bfloat16 where AVX-512 has none and emulates it.
    """
    import torch

    return torch.cpu._is_avx512_bf16_supported()


def resolve_device(device: str) -> str:
    """auto -> cuda where there is one, else cpu. Raises ConfigError for a device that torch does not see."""
    import torch

    check_device(device)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    there = not device.startswith("cuda") or torch.cuda.is_available()
    require(there, "device", device, "cpu or auto, as torch sees no CUDA device here")
    return device


def _lacks_cuda() -> bool:
    with suppress(PackageNotFoundError):
        build = version("torch").partition("+")[2]
        if build == "cpu" or build.startswith("rocm"):  # a ROCm build calls its devices cuda
            return build == "cpu"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
