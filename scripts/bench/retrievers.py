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
import time
import traceback
from pathlib import Path
from typing import Any

from data.errors import ConfigError
from data.jsonl import read_json, write_json
from scripts.bench.retriever_rows import ROWS
from scripts.bench.retriever_world import Row, Work

METRICS = "nDCG@10,R@10,R@20,RR@10"
SHOWN = "nDCG@10"


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
    for name in only or ():
        if name not in ROWS:
            raise ConfigError(f"only: {name!r} is none of {', '.join(ROWS)}")
    wanted = [name for name in only or ROWS if not tables or ROWS[name].table in tables]
    if rows:
        print(
            "\n".join(
                f"{name:28} ({ROWS[name].table}) against {', '.join(ROWS[name].against)}" for name in wanted
            )
        )
        return
    of = Work(Path(work), Path(data), questions, steps)
    if not table:
        needed = dict.fromkeys(each for name in wanted for each in (*ROWS[name].against, name))
        failed = [error for name in needed if (error := _run(of, name, ROWS[name], again and name in wanted))]
    else:
        failed = []
    print(markdown(of.folder / "results", {name: ROWS[name] for name in wanted}))
    if failed:
        sys.exit("\n".join(failed))


def _run(work: Work, name: str, row: Row, again: bool) -> str | None:
    """Ask a row the questions of its collections, unless that is done; what went wrong, or None."""
    from retriever_server.evaluation import judge, judge_answers, parse_metrics, rank_all

    path = work.folder / "results" / f"{name}.json"
    if path.exists() and not again:
        return None
    print(f"{name} ...", file=sys.stderr, flush=True)
    start, cpu = time.perf_counter(), time.process_time()
    values = {}
    try:
        for collection in row.on:
            asked, qrels = work.questions(collection)
            retriever = row.make(work, collection)
            rankings = rank_all(retriever, asked, row.depth)
            values[collection] = judge(rankings, qrels, parse_metrics(METRICS, row.depth))
            if any(question.gold_answers for question in asked):
                values[collection] |= judge_answers(rankings, asked, row.depth)
            retriever.close()
        note = row.note(work) if row.note else {}
    except Exception as error:  # the other rows can go on
        traceback.print_exc()
        return f"{name}: {type(error).__name__}: {error}"
    seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    write_json(path, {"row": name, **seconds, "note": note, "values": values})
    print(f"{name}: {seconds['seconds']:.0f} s", file=sys.stderr, flush=True)
    return None


def markdown(results: Path, rows: dict[str, Row]) -> str:
    """What there is of the rows: scores, and differences from the rows that each is held against."""
    parts = []
    for table in dict.fromkeys(row.table for row in rows.values()):
        lines = ["| row | collection | nDCG@10 | R@20 | answer@20 | against | difference [95 %] | p | s |"]
        lines.append(f"|{' --- |' * 2}{' ---: |' * 3} --- |{' ---: |' * 3}")
        notes = []
        for name, row in rows.items():
            path = results / f"{name}.json"
            if row.table != table or not path.exists():
                continue
            found = read_json(path)
            for collection in row.on:
                lines += _lines(results, name, row, found, collection)
            notes += [f"- {name}: {key}: {value}" for key, value in found["note"].items()]
        parts += [f"### ({table})", "", *lines, "", *notes, ""]
    return "\n".join(parts)


def _lines(results: Path, name: str, row: Row, found: dict[str, Any], collection: str) -> list[str]:
    """The lines of a row in one collection: one, or one a row that it is compared with."""
    from retriever_server.evaluation import compare, means

    values = found["values"][collection]
    mean = means(values)
    scores = [f"{mean[metric]:.3f}" if metric in mean else "" for metric in (SHOWN, "R@20", "answer@20")]
    cells, lines = [name, collection, *scores], []
    for other in row.against:
        path = results / f"{other}.json"
        theirs = read_json(path)["values"].get(collection) if path.exists() else None
        if theirs is None or set(theirs[SHOWN]) != set(values[SHOWN]):
            continue
        of = compare({SHOWN: values[SHOWN]}, {SHOWN: theirs[SHOWN]})[SHOWN]
        shown = f"{of['difference']:+.3f} [{of['low']:+.3f}, {of['high']:+.3f}]"
        lines.append([*cells, other, shown, f"{of['p']:.4f}", f"{found['seconds']:.0f}"])
        cells = ["", "", "", "", ""]
    lines = lines or [[*cells, "", "", "", f"{found['seconds']:.0f}"]]
    return [f"| {' | '.join(line)} |" for line in lines]


if __name__ == "__main__":
    from scripts.command_line import call

    call(main, sys.argv[1:], "python -m scripts.bench.retrievers")
