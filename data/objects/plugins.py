"""Classes and functions that a user names by `module.name`: found, and imported as late as can be.

A module is looked for beside the file that names it, in the working directory, then among what is
installed. To import it is to run it, so its source is read first: one that does not define the name is
not imported.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import sys
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from importlib import util
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from data.errors import ConfigError
from data.objects.moved import current_name

OURS = ("agent", "data", "retriever_server", "rl", "scripts")
"""Never taken from a user's folder."""
_beside: ContextVar[tuple[Path, ...]] = ContextVar("folders of the files being read", default=())
_taken: dict[str, str] = {}
"""Top-level module -> its file, of those that were found in a user's folder."""


@contextlib.contextmanager
def looking_beside(*files: str | Path) -> Iterator[None]:
    """Look for modules beside these files first, until the block ends."""
    folders = tuple(Path(file).absolute().parent for file in files)
    token = _beside.set((*folders, *_beside.get()))
    try:
        yield
    finally:
        _beside.reset(token)


def find_plugin(name: str, place: str) -> Any:
    """Return the object `module.name`. `place` begins the ConfigError where there is none."""
    module, _, attribute = current_name(name).rpartition(".")
    if not module or not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"{place}: {name!r} must be like module.name")
    spec = locate(module)
    if spec is None:
        looked = ", ".join(dict.fromkeys(map(str, folders())))
        there = "; it is in Sleuth's repository" if module.startswith("examples.") else ""
        raise ConfigError(f"{place}: {name!r}: no module {module} in {looked}, nor installed{there}")
    names = defined_names(spec, place)
    if names is not None and attribute not in names:
        close = difflib.get_close_matches(attribute, names, n=1) or sorted(names)[:5] or ["nothing"]
        has = f"defines no {attribute}, but {', '.join(close)}"
        raise ConfigError(f"{place}: {name!r}: {spec.origin} {has}")
    try:
        imported = _import(module, place)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{place}: {name!r} cannot be imported: {what_was_raised(error)}") from error
    if not hasattr(imported, attribute):
        file = getattr(imported, "__file__", None) or "built into Python"
        raise ConfigError(f"{place}: {name!r}: the module {module} ({file}) has no {attribute}")
    return getattr(imported, attribute)


def locate(module: str) -> ModuleSpec | None:
    """Find where a module lies; nothing is imported, no package above it either."""
    importlib.invalidate_caches()
    for folder in folders():
        if str(folder) not in sys.path:
            sys.path.append(str(folder))  # last, and for good: what the module imports later may lie there
    top, *below = module.split(".")
    with contextlib.suppress(ImportError, ValueError):
        spec = _in_folders(top) or util.find_spec(top)
        for part in below:
            if spec is None or spec.submodule_search_locations is None:
                return None
            spec = PathFinder.find_spec(part, list(spec.submodule_search_locations))
        return spec
    return None


def defined_names(spec: ModuleSpec, place: str) -> set[str] | None:
    """Return the names that a module's source binds; None where only running it would tell."""
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    try:
        tree = ast.parse(Path(spec.origin).read_bytes())
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise ConfigError(f"{place}: {spec.origin}, line {line}: not Python: {error.args[0]}") from error
    names = set(_bound(tree))
    return None if names & {"*", "__getattr__"} else names


def what_was_raised(error: BaseException) -> str:
    """Return an error in a user's code as one line.   -> "ValueError: no key (my_search.py, line 12)" """
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def folders() -> list[Path]:
    """Return the folders where modules are looked for first."""
    return [*_beside.get(), Path.cwd()]


def _in_folders(top: str) -> ModuleSpec | None:
    """Find a top-level module in a user's folder; one without __init__.py may be any folder, and is none."""
    if top in OURS:
        return None
    spec = PathFinder.find_spec(top, [str(folder) for folder in folders()])
    return spec if spec is not None and spec.origin is not None else None


def _import(module: str, place: str) -> Any:
    top = module.partition(".")[0]
    spec = _in_folders(top)
    if spec is None or spec.loader is None or (top in sys.modules and top not in _taken):
        return importlib.import_module(module)
    file = str(spec.origin)
    if top in sys.modules and _taken[top] != file:  # Python knows a module by its name alone
        raise ConfigError(f"{place}: {file}: another {top} is in use, {_taken[top]}; rename one of the two")
    if top not in sys.modules:
        sys.modules[top] = made = util.module_from_spec(spec)
        try:
            spec.loader.exec_module(made)
        except BaseException:
            del sys.modules[top]
            raise
        _taken[top] = file
    return importlib.import_module(module)


def _bound(node: ast.AST) -> Iterator[str]:
    """Yield the names that statements bind, inside `if`, `try`, `with` and loops too; "*" for a star."""
    for each in ast.iter_child_nodes(node):
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield each.name
        elif isinstance(each, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).partition(".")[0] for alias in each.names)
        elif isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
            yield each.id
        else:
            yield from _bound(each)


def names_in_source(module: str, imported: bool = False) -> list[str]:
    """List the functions and classes that an installed module defines or imports; it is not run."""
    kinds = (ast.FunctionDef, ast.ClassDef, *((ast.ImportFrom,) if imported else ()))
    body = [each for each in _source(module) if isinstance(each, kinds)]
    return [name for each in body for name in _bound(ast.Module([each], []))]


def parameters_in_source(module: str, name: str) -> list[str] | None:
    """Return the parameters of a function or class that a module defines; None where there may be others."""
    node = next((each for each in _source(module) if getattr(each, "name", None) == name), None)
    if isinstance(node, ast.ClassDef):
        node = next((each for each in node.body if getattr(each, "name", None) == "__init__"), None)
    if not isinstance(node, ast.FunctionDef) or node.args.kwarg is not None:
        return None
    return [each.arg for each in (*node.args.args, *node.args.kwonlyargs) if each.arg != "self"]


def _source(module: str) -> list[ast.stmt]:
    spec = locate(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return []
    return ast.parse(Path(spec.origin).read_bytes()).body
