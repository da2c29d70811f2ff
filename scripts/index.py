"""`sleuth index`: a corpus in, a BM25 index on disk out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from data.records import Passage


def main(
    corpus: str,
    out: str,
    k1: float = 0.9,
    b: float = 0.4,
    analyzer: str = "plain",
    title_boost: int = 1,
    overwrite: bool = False,
) -> None:
    """Build a BM25 index of a corpus. The same corpus and settings at `out` are reused as they are.

    Args:
        corpus: JSON lines file of passages, {"id", "contents"} or {"id", "title", "text"}.
        out: Folder for the index.
        k1: How much a repeated word counts.
        b: How much long passages are held back, 0 to 1.
        analyzer: plain (lower-cased words) or stopwords (without the commonest English ones).
        title_boost: How many times the title counts.
        overwrite: Replace a different index at `out`.
    """
    from data.corpus import Corpus
    from retriever_server.indexes.bm25 import BM25Index

    passages = Corpus(Path(corpus))
    built = False

    def shown(items: Iterable[Passage]) -> Iterable[Passage]:
        nonlocal built
        built = True
        return _with_bar(items, len(passages))

    index = BM25Index.build(passages, out, k1, b, analyzer, title_boost, overwrite=overwrite, progress=shown)
    done = "indexed" if built else "already there:"
    print(f"{done} {len(passages):,} passages in {out} (generation {index.generation})")


def _with_bar(items: Iterable[Passage], total: int) -> Iterable[Passage]:
    """A bar with rate and time left, on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("reading passages"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.speed:,.0f}/s" if total else ""),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield from progress.track(items, total=total)
