"""The command of a table of the benchmarks: runs its rows and prints it, for `retrievers` and `multimodal`.

What a row found is kept as WORK/results/ROW.json, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.errors import ConfigError
from data.jsonl import read_json, write_json
from scripts.bench.retriever_world import Row, Work

METRICS = "nDCG@10,R@10,R@20,RR@10"


def command(
    rows_of: Mapping[str, Row], world: type[Work], folder: str, most: int,
    shown: Sequence[str], compared: Sequence[str] = (),
) -> Callable[..., None]:  # fmt: skip
    """The `main` of a table, by default in `folder` with `most` questions; shown, compared: of `markdown`."""

    def main(
        data: str = "../shared/data",
        work: str = folder,
        only: list[str] | None = None,
        tables: list[str] | None = None,
        questions: int = most,
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
            tables: The rows of these tables alone; --rows true names them.
            questions: At most so many of each collection.
            steps: At most so many of a training: to try the script.
            rows: Only list the rows.
            table: Only print what there is.
            again: Run the rows named by `only` although they have a result.
        """
        wanted = _chosen(rows_of, only, tables)
        if rows:
            print(_listed(rows_of, wanted))
            return
        of = world(Path(work), Path(data), questions, steps)
        failed = [] if table else run_rows(of, rows_of, wanted, again)
        print(markdown(of.folder / "results", {name: rows_of[name] for name in wanted}, shown, compared))
        if failed:
            sys.exit("\n".join(failed))

    return main


def _chosen(rows: Mapping[str, Row], only: Sequence[str] | None, tables: Sequence[str] | None) -> list[str]:
    """The names of the rows that are asked for; ConfigError for one that there is not."""
    for name in only or ():
        if name not in rows:
            raise ConfigError(f"only: {name!r} is none of {', '.join(rows)}")
    return [name for name in only or rows if not tables or rows[name].table in tables]


def _listed(rows: Mapping[str, Row], names: Sequence[str]) -> str:
    """A line a row: its table, and what it is held against."""
    return "\n".join(
        f"{name:28} ({rows[name].table}) against {', '.join(rows[name].against)}" for name in names
    )


def run_rows(work: Work, rows: Mapping[str, Row], names: Sequence[str], again: bool = False) -> list[str]:
    """Run these rows, and those they are held against, that have no result yet; what went wrong."""
    needed = dict.fromkeys(each for name in names for each in (*rows[name].against, name))
    return [error for name in needed if (error := _run(work, name, rows[name], again and name in names))]


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


def markdown(
    results: Path, rows: Mapping[str, Row], shown: Sequence[str], compared: Sequence[str] = ()
) -> str:
    """Return what there is of the rows: scores, and differences from the rows that each is held against.

    shown: names of metrics. compared: those of them whose differences are given, with the interval of a
    paired bootstrap over the questions; the first if none is named.
    """
    compared, parts = compared or shown[:1], []
    heads = [f"difference{f' of {metric}' if compared[1:] else ''} [95 %] | p" for metric in compared]
    for table in dict.fromkeys(row.table for row in rows.values()):
        lines = [f"| row | collection | {' | '.join(shown)} | against | {' | '.join(heads)} | s |"]
        lines.append(f"|{' --- |' * 2}{' ---: |' * len(shown)} --- |{' ---: |' * (2 * len(heads) + 1)}")
        notes = []
        for name, row in rows.items():
            path = results / f"{name}.json"
            if row.table != table or not path.exists():
                continue
            found = read_json(path)
            for collection in row.on:
                lines += _lines(results, name, row, found, collection, shown, compared)
            notes += [f"- {name}: {key}: {value}" for key, value in found["note"].items()]
        parts += [f"### ({table})", "", *(lines if lines[2:] else ()), "", *notes, ""]
    return "\n".join(parts)


def _lines(
    results: Path, name: str, row: Row, found: dict[str, Any], collection: str,
    shown: Sequence[str], compared: Sequence[str],
) -> list[str]:  # fmt: skip
    """The lines of a row in one collection: one, or one a row that it is compared with."""
    from retriever_server.evaluation import compare, means

    values = found["values"][collection]
    mean = means(values)
    scores = [f"{mean[metric]:.3f}" if metric in mean else "" for metric in shown]
    cells, lines, seconds = [name, collection, *scores], [], f"{found['seconds']:.0f}"
    ours = {metric: values[metric] for metric in compared}
    for other in row.against:
        path = results / f"{other}.json"
        theirs = read_json(path)["values"].get(collection) if path.exists() else None
        if theirs is None or any(set(theirs[metric]) != set(ours[metric]) for metric in compared):
            continue
        of = compare(ours, {metric: theirs[metric] for metric in compared})
        differences = [part for metric in compared for part in _difference(of[metric])]
        lines.append([*cells, other, *differences, seconds])
        cells = [""] * len(cells)
    lines = lines or [[*cells, "", *[""] * 2 * len(compared), seconds]]
    return [f"| {' | '.join(line)} |" for line in lines]


def _difference(of: Mapping[str, float]) -> tuple[str, str]:
    return f"{of['difference']:+.3f} [{of['low']:+.3f}, {of['high']:+.3f}]", f"{of['p']:.4f}"
