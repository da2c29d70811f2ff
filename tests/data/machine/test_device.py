"""A device that is not there is refused without torch; what cannot be told is left to torch."""

import ctypes

import pytest
import torch

from data.errors import ConfigError
from data.machine import device
from data.machine.device import check_device, choose_dtype


def here(monkeypatch, build, driver=True, visible=None):
    def load(name):
        if not driver:
            raise OSError(name)

    monkeypatch.setattr(device, "version", lambda _: f"2.13.0{build}")
    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


@pytest.mark.parametrize(
    "there", [("+cu130", True), ("", True), ("+rocm6.4", False), ("+cu130", True, "0,1")]
)
def test_a_device_that_may_be_there_is_left_to_torch(monkeypatch, there):
    here(monkeypatch, *there)
    for name in ("cuda", "cuda:1", "cpu", "auto"):
        check_device(name)


@pytest.mark.parametrize(
    "lacking", [("+cpu", True), ("+cu130", False), ("", False), ("+cu130", True, ""), ("+cu130", True, "-1")]
)
def test_a_device_that_is_surely_not_there_is_refused(monkeypatch, lacking):
    here(monkeypatch, *lacking)
    with pytest.raises(ConfigError, match=r"device = 'cuda:0': must be cpu or auto, as there is no CUDA"):
        check_device("cuda:0")
    check_device("cpu")


def test_a_device_of_no_known_kind_is_refused():
    with pytest.raises(ConfigError, match="device = 'tpu': must be auto, cpu or cuda"):
        check_device("tpu")


@pytest.mark.parametrize("native", [False, True])
def test_bfloat16_is_warned_of_where_the_cpu_emulates_it(monkeypatch, caplog, native):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native, raising=False)
    asked = [("auto", "cpu"), ("float32", "cpu"), ("auto", "cuda:0"), ("bfloat16", "cuda")]
    assert [choose_dtype(*each) for each in asked] == ["float32", "float32", "bfloat16", "bfloat16"]
    assert not caplog.messages
    assert choose_dtype("bfloat16", "cpu") == "bfloat16"
    assert ["only emulates" in message for message in caplog.messages] == [True] * (not native)
