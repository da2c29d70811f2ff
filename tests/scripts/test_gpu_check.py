"""`scripts/gpu_check.sh`: results are kept, failures and hangs are told, no more time is taken than given."""

import json
import subprocess

import pytest

from data.errors import ConfigError
from scripts.bench import gpu_check


@pytest.fixture
def ran(monkeypatch):
    """Parts that ran, each of which passes, fails or takes too long by its name."""
    names = []

    def run(command, timeout, **_):
        name = command[-1]
        names.append((name, timeout))
        if name == "flat":
            raise subprocess.TimeoutExpired(command, timeout)
        out = {"packing": '{"a": 0.12345}', "vllm": '{"not run": "vllm is not installed"}'}.get(name, "")
        return subprocess.CompletedProcess(command, int(not out), f"noise\n{out}", "reason | of\nit")

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    return names


def test_each_part_has_its_row_and_what_passed_is_not_run_again(ran, tmp_path, capsys):
    with pytest.raises(ConfigError, match="parts = 'packing,luck': must be of packing, masters, "):
        gpu_check.main(str(tmp_path), parts="packing,luck")
    parts = "packing,masters,flat,vllm"
    assert gpu_check.main(str(tmp_path), parts=parts) == 1
    told = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert [each["status"] for each in told.values()] == ["passed", "failed", "failed", "not run"]
    table = (tmp_path / "gpu_check.md").read_text()
    assert "| packing | passed |" in table and "a 0.1235 |" in table
    assert "reason / of it |" in table and "took more than" in table
    ran.clear()
    gpu_check.main(str(tmp_path), parts=parts)
    assert [name for name, _ in ran] == ["masters", "flat", "vllm"]


def test_no_more_time_is_taken_than_was_given(ran, tmp_path):
    gpu_check.main(str(tmp_path), seconds=20, parts="packing")
    assert ran[0][1] <= 20
    gpu_check.main(str(tmp_path / "none"), seconds=1)
    told = json.loads((tmp_path / "none" / "gpu_check.json").read_text())["parts"]
    assert len(ran) == 1 and {each["reason"] for each in told.values()} == {"no time was left"}
    assert told.keys() == gpu_check.PARTS.keys()


def test_updates_of_half_precision_weights_are_those_of_their_copies():
    assert gpu_check.masters()["relative error of the change of the weights"] < 0.2
