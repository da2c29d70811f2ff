"""`sleuth matrix`: every policy with every retriever, at every number of passages and searches."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from agent.engines.config import EngineConfig
from data.errors import require, require_range
from data.text import counted
from rl.config import ProtocolConfig
from scripts.agent_options import QuestionOptions
from scripts.console import bar, show_table
from scripts.evaluate import EvaluateConfig

if TYPE_CHECKING:
    from agent.evaluation.matrix import Cell


@dataclass(frozen=True, kw_only=True)
class MatrixConfig(QuestionOptions):
    """Evaluate every policy with every retriever; a cell is a folder as `sleuth evaluate` makes it."""

    policies: dict[str, str]
    """Name -> folder, hub name, or one that comes with Sleuth."""
    retrievers: dict[str, str]
    """Name -> URL, folder of an index, .yaml file, none or random:INDEX."""
    out: Path
    """Folder of the matrix."""
    top_k: list[int] = field(default_factory=list)
    """Passages a search; none: the policies' own."""
    searches: list[int] = field(default_factory=list)
    """Searches a trajectory may make; none: the policies' own."""
    baseline: str | None = None
    """Cell that the others are compared with, POLICY.RETRIEVER[.kK][.sS]; none: the first."""
    diagonal: bool = False
    """Also compare the policies with the retriever of their own place in the list with all other pairs."""
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    temperature: float = 0.0
    """Temperature of sampling; 0 is greedy."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    dtype: str = "auto"
    """float32, bfloat16, or auto: bfloat16 on cuda, else float32."""

    def __post_init__(self) -> None:
        for key in ("policies", "retrievers"):
            names = getattr(self, key)
            require(bool(names), key, names, "at least one, {NAME: SOURCE, ...}")
            for name in names:
                plain = re.fullmatch(r"[\w-]+", name) is not None
                require(plain, f"{key}.{name}", names[name], "a name of letters, digits, _ and -")
        require(all(k >= 1 for k in self.top_k), "top_k", self.top_k, ">= 1")
        require(all(s >= 0 for s in self.searches), "searches", self.searches, ">= 0")
        require_range(self, "", ">= 1", "samples")
        names = [cell.name for cell in self.cells]
        allowed = f"one of {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        require(self.baseline in (None, *names), "baseline", self.baseline, allowed)
        square = len(self.policies) == len(self.retrievers) > 1
        require(square or not self.diagonal, "diagonal", True, "as many policies as retrievers, two or more")

    @property
    def cells(self) -> list[Cell]:
        from agent.evaluation.matrix import Cell

        limits = (self.top_k or [None], self.searches or [None])
        return [Cell(*each) for each in product(self.policies, self.retrievers, *limits)]

    def of_cell(self, cell: Cell, folder: Path) -> EvaluateConfig:
        limits = {"top_k": cell.top_k, "max_turns": cell.searches}
        given = {key: value for key, value in limits.items() if value is not None}
        shared = {each.name: getattr(self, each.name) for each in fields(QuestionOptions)}
        shared |= {name: getattr(self, name) for name in ("engine", "temperature", "device", "dtype")}
        shared["protocol"] = replace(self.protocol, **given)
        pair = {"policy": self.policies[cell.policy], "retriever": self.retrievers[cell.retriever]}
        return EvaluateConfig(**pair, out=str(folder), **shared)


def main(config: MatrixConfig) -> None:
    """Evaluate every policy with every retriever, and compare all cells on the same questions.

    Writes OUT/cells/, matrix.json, matrix.md and matrix.csv; with two policies and two retrievers also what
    either changes, and their interaction. The same command goes on where it stopped.
    """
    from agent.evaluation.matrix import contrast_table, read_matrix, table, write_matrix
    from retriever_server.open_retriever import check_retriever
    from scripts.evaluate import run
    from scripts.wiring import check_agent

    folders = {cell: config.out / "cells" / cell.name for cell in config.cells}
    asked = [config.of_cell(cell, folder) for cell, folder in folders.items()]
    for policy in config.policies.values():
        check_agent(policy, config.protocol, config.device, config.engine)
    for retriever in config.retrievers.values():
        check_retriever(retriever)
    with bar("evaluating cells", len(asked)) as move:
        for done, each in enumerate(asked, start=1):
            run(each)
            move(done)
    named = {cell.name: cell for cell in folders}
    baseline = named[config.baseline] if config.baseline else config.cells[0]
    matrix = read_matrix(folders, baseline, config.diagonal)
    write_matrix(config.out, matrix)
    show_table(counted(matrix["n"], "question"), *table(matrix))
    if matrix["contrasts"]:
        show_table("", *contrast_table(matrix))
    print(f"`sleuth report {config.out}` draws it")
