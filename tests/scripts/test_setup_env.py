"""`setup_env.sh` installs once, and again only where pyproject.toml has changed."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path):
    """A checkout with an environment whose pip only writes down that it was called."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/setup_env.sh", tmp_path / "scripts")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text(
        f'#!/bin/sh\n[ "$2" = pip ] && {{ echo "$@" >>pip.log; exit; }}\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    return tmp_path


def start(checkout: Path, extra: str) -> None:
    script = (
        f'set -euo pipefail; source scripts/setup_env.sh; setup_env "{extra}" --out x; echo "${{ARGS[*]}}"'
    )
    done = subprocess.run(["bash", "-c", script], cwd=checkout, check=True, capture_output=True, text=True)
    assert done.stdout == "--out x\n"


@pytest.mark.parametrize("stamp", ["installed-plain", "installed-test"])
def test_a_second_start_installs_nothing(checkout, stamp):
    stamped = hashlib.sha256((checkout / "pyproject.toml").read_bytes()).hexdigest()
    (checkout / ".venv" / stamp).write_text(f"{stamped}\n")
    start(checkout, "")
    assert not (checkout / "pip.log").exists()


def test_the_first_start_and_a_changed_project_install(checkout):
    start(checkout, "")
    first = (checkout / "pip.log").read_text()
    assert "install" in first and "-e ." in first
    start(checkout, "")
    assert (checkout / "pip.log").read_text() == first
    (checkout / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    start(checkout, "")
    assert (checkout / "pip.log").read_text() != first
