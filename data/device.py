"""A device that a user names, judged without torch, which takes seconds to import."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from data.errors import require


def check_device(device: str) -> None:
    """Raise ConfigError for a device that this machine surely lacks; torch has the last word.

    "cuda:0" without a driver or with a torch for CPUs -> ConfigError; "cpu", "auto" -> nothing
    """
    kind = device.partition(":")[0]
    require(kind in ("auto", "cpu", "cuda", "mps"), "device", device, "auto, cpu or cuda")
    there = kind != "cuda" or not _lacks_cuda()
    require(there, "device", device, "cpu or auto, as there is no CUDA device here")


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
