"""Whether the recipes learn, on real text: one table with paired 95 % intervals.

    python -m scripts.bench.retrievers --data DATA [--work runs/retrievers] [--only '[dpr, splade]']

A row is a retriever: made, trained if it must be, asked the held-out questions of its collections, and
compared with other rows question by question. What a row found is kept as WORK/results/ROW.json, so that the
same command goes on where it was stopped; `--rows true` lists them, `--table true` shows what is there.

(a) all-MiniLM-L6-v2 fine-tuned on squad_sentences and squad's training questions, against itself frozen
    and BM25: squad dev in domain, hotpotqa and Cranfield out of it.
(b) tiny transformers from scratch (two layers of 64, a vocabulary of 4,000), each against itself untrained,
    on squad dev, whose titles no training question knows.
(c) in domain against out of domain for BM25, MiniLM and SmolLM2-135M, over few passages.
(peer) sentence-transformers driven plainly with the same data, model and batch: speed and score.
"""

from __future__ import annotations

import sys
from pathlib import Path

from scripts.bench.retriever_rows import ROWS
from scripts.bench.retriever_world import Work
from scripts.bench.row_table import chosen, listed, markdown, run_rows

SHOWN = ("nDCG@10", "R@20", "answer@20")


def main(
    data: str = "../shared/data",
    work: str = "runs/retrievers",
    only: list[str] | None = None,
    tables: list[str] | None = None,
    questions: int = 2000,
    steps: int = 10_000,
    rows: bool = False,
    table: bool = False,
    again: bool = False,
) -> None:
    """Run the rows that have no result yet, then print all results as Markdown.

    Args:
        data: Folder of the collections.
        work: Folder of all that is made.
        only: These rows alone, and those that they are compared with.
        tables: The rows of these tables alone: a, b, c, peer.
        questions: At most so many of each collection.
        steps: At most so many of a training: to try the script.
        rows: Only list the rows.
        table: Only print what there is.
        again: Run the rows named by `only` although they have a result.
    """
    wanted = chosen(ROWS, only, tables)
    if rows:
        print(listed(ROWS, wanted))
        return
    of = Work(Path(work), Path(data), questions, steps)
    failed = [] if table else run_rows(of, ROWS, wanted, again)
    print(markdown(of.folder / "results", {name: ROWS[name] for name in wanted}, SHOWN))
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    from scripts.command_line import call

    call(main, sys.argv[1:], "python -m scripts.bench.retrievers")
