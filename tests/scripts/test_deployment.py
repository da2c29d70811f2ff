"""Units and options that docs/serving.md prints are those that systemd and `sleuth serve` take."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.command_line import build_parser, parse
from scripts.serve import main

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def block(language: str, contains: str) -> str:
    found = [text for text in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if contains in text]
    assert len(found) == 1
    return found[0]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd")
def test_the_unit_is_one_to_systemd(tmp_path):
    unit = tmp_path / "sleuth.service"
    text = block("ini", "ExecStart")
    unit.write_text(text.replace("/opt/sleuth/bin/sleuth", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    unit.write_text(text.replace("DynamicUser=yes", "DynamicUsers=yes"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert "DynamicUsers" in done.stderr


def test_its_configuration_is_one_to_serve(tmp_path):
    (tmp_path / "serve.yaml").write_text(block("yaml", "workers: 4"))
    values = parse(build_parser(main, "sleuth serve"), ["--config", str(tmp_path / "serve.yaml")])
    assert values["workers"] == 4 and values["batching"].max_batch == 128
    credential = re.search("LoadCredential=(.+?):", block("ini", "ExecStart"))
    assert credential and values["token_file"].endswith(f"sleuth.service/{credential[1]}")
