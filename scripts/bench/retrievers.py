"""Measure what the recipes learn, on real text: one table with paired 95 % intervals.

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

from scripts.bench.retriever_rows import ROWS
from scripts.bench.retriever_world import Work
from scripts.bench.row_table import command

main = command(ROWS, Work, "runs/retrievers", 2000, ("nDCG@10", "R@20", "answer@20"))

if __name__ == "__main__":
    from scripts.__main__ import run_script

    run_script(main)
