"""The names we install are ours, and what we install is all there."""

import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import subprocess
import sys
import venv
import zipfile
from functools import cache
from pathlib import Path

import pytest

from scripts.__main__ import COMMANDS
from scripts.command_line import known_keys, known_parser

ROOT = Path(__file__).parent.parent
PACKAGES = ["agent", "rl", "retriever_server", "data", "scripts"]


def shipped_files() -> set[str]:
    """Return what git tracks, or is about to, under the packages: all of it belongs in the wheel."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES]
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in files.splitlines() if (ROOT / name).is_file()}


@cache
def top_level_names() -> set[tuple[str, str]]:
    """Each installed distribution with what it puts on the path; its name is parsed out of METADATA once."""
    return {
        (name, line.partition(",")[0].partition("/")[0])
        for name, dist in ((dist.name, dist) for dist in importlib.metadata.distributions())
        for line in (dist.read_text("RECORD") or "").splitlines()
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_names_are_ours(package):
    spec = importlib.util.find_spec(package)
    assert spec and spec.origin and Path(spec.origin).parent == ROOT / package, (
        f"{package} is shadowed by {spec and spec.origin}"
    )
    owners = {name for name, top in top_level_names() if top in (package, f"{package}.py")}
    assert owners <= {"sleuth-rl"}, f"{owners} also install a top-level '{package}'"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_folder_with_python_lacks_its_init(package):
    for folder in {path.parent for path in (ROOT / package).rglob("*.py")}:
        assert (folder / "__init__.py").exists(), f"{folder.relative_to(ROOT)}/ is no package"


def test_gitignore_hides_no_package():
    # hatchling silently leaves out of the wheel what git ignores.
    lines = {line.strip().strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    assert not lines & {*PACKAGES, "configs", "*.yaml", "*.json", "*.gz", "*.safetensors"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_typed_documented_main(name):
    command = COMMANDS[name]
    run = importlib.import_module(command.module).main
    assert inspect.getdoc(run), f"{command.module}.main has no docstring"
    parser = known_parser(run, f"sleuth {name}", command.positional)
    assert command.positional is None or f"--{command.positional}" in parser.format_help()


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda path: path.name)
def test_launchers_name_options_and_recipes_that_exist(path):
    code = re.sub(r"(?m)#.*$|\\\n", "", path.read_text())
    for name, words in re.findall(r"(?m)^(?:exec )?(?:\.venv/bin/)?sleuth ([\w-]+)(.*)", code):
        command = COMMANDS[name]
        keys = known_keys(known_parser(importlib.import_module(command.module).main, name))
        assert set(re.findall(r"--([\w.]+)", words)) <= {*keys, "config"}
        assert all((ROOT / recipe).is_file() for recipe in re.findall(r"\S+\.yaml", words))


@pytest.mark.slow
def test_the_wheel_holds_every_file_and_works_alone(tmp_path):
    pip = [sys.executable, "-m", "pip", "-qq"]
    wheel_of = [*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(wheel_of, check=True)
    (wheel,) = tmp_path.glob("sleuth_rl-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert not shipped_files() - held
    assert not [name for name in held if name.startswith("tests")]

    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    install = [*pip, "--python", str(python), "install", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    sleuth = [str(tmp_path / "venv/bin/sleuth"), "--help"]
    done = subprocess.run(sleuth, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "quickstart" in done.stdout
