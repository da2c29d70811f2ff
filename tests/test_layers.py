"""The rules of the house: imports go down a floor, no cycles, small files, light front doors."""

import ast
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ["scripts", "rl", "agent", "retriever_server", "data"]  # top floor first
MAX_LINES = 400
MAX_DEPTH = 6  # imports on loading, from the front door down to what imports nothing
MAX_DEPTH_WITH_LATE = 13  # those inside functions counted; benches left out
# All that `agent` may see of the floor below: light, and the same for every retriever.
OPEN_TO_AGENT = {"client", "retriever"}
LIGHT = [
    "scripts.__main__",
    "agent.protocol",
    "agent.trajectory",
    "agent.engines.base",
    "retriever_server.client.search_client",
    "retriever_server.retriever",
    "retriever_server.client.wire",
    "data.errors",
    "data.records",
    "data.corpus",
    "data.questions",
    "data.metrics.answers",
]


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in python_files(*FLOORS)}


def names_in(nodes: Iterable[ast.AST]) -> set[str]:
    """The dotted names that statements import; `from a import b` gives a and a.b."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: from {'.' * node.level}: name the floor"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def imported_names(path: Path) -> set[str]:
    """All that a file imports, lazily or not."""
    return names_in(ast.walk(parsed(path)))


def names_on_load(path: Path) -> set[str]:
    """All that a file imports when it is loaded."""
    return names_in(parsed(path).body)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def modules_among(names: set[str], importer: str) -> set[str]:
    """Those of names that are modules of ours; a package only if none of its modules is meant."""
    ours = names & set(MODULES) - {importer}
    return {name for name in ours if not any(other.startswith(f"{name}.") for other in ours)}


@cache
def imports_of_all(on_load: bool) -> dict[str, set[str]]:
    """Return what each module imports: when it is loaded, or at all."""
    return {
        module: modules_among(names_on_load(path) if on_load else imported_names(path), module)
        for module, path in MODULES.items()
    }


def longest_chains(graph: dict[str, set[str]]) -> dict[str, tuple[str, ...]]:
    """Return the longest chain of imports below each module; CycleError names the modules of a cycle."""
    chains: dict[str, tuple[str, ...]] = {}
    for module in TopologicalSorter(graph).static_order():
        below = (chains[each] for each in sorted(graph[module]))
        chains[module] = (module, *max(below, key=len, default=()))
    return chains


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_go_down(floor):
    above = set(FLOORS[: FLOORS.index(floor)]) | {"examples", "tests"}
    for path in python_files(floor):
        up = {name for name in imported_names(path) if name.split(".")[0] in above}
        assert not up, f"{path.relative_to(ROOT)} imports {sorted(up)}, which stand above it"


def test_the_agent_sees_only_the_open_side_of_the_retriever_server():
    for path in python_files("agent"):
        for name in imported_names(path):
            parts = name.split(".")
            if parts[0] == "retriever_server" and len(parts) > 1:
                assert parts[1] in OPEN_TO_AGENT, f"{path.relative_to(ROOT)} imports {name}"


def test_no_import_cycle_lazy_imports_included():
    assert longest_chains(imports_of_all(False)).keys() == MODULES.keys()


@pytest.mark.parametrize(("on_load", "most"), [(True, MAX_DEPTH), (False, MAX_DEPTH_WITH_LATE)])
def test_no_chain_of_imports_is_too_deep(on_load, most):
    chains = longest_chains(imports_of_all(on_load))
    chain = max((chains[module] for module in MODULES if not module.startswith("scripts.bench.")), key=len)
    assert len(chain) - 1 <= most, " > ".join(chain)


@pytest.mark.parametrize("module", LIGHT)
def test_front_doors_load_nothing_heavy(module):
    heavy = "{'torch', 'transformers', 'datasets', 'bm25s', 'faiss', 'trl'}"
    code = f"import sys, {module}; print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", f"import {module} loads {done.stdout.strip()}"


def test_files_are_small():
    sizes = {path: len(path.read_text().splitlines()) for path in python_files(*FLOORS, "examples", "tests")}
    too_long = {str(p.relative_to(ROOT)): n for p, n in sizes.items() if n > MAX_LINES}
    assert not too_long, f"over {MAX_LINES} lines: {too_long}"
