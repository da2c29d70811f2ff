"""`sleuth compare`: runs of the same questions side by side, with paired differences and what flipped."""

from __future__ import annotations

from pathlib import Path

from data.atomic import atomic_write
from data.errors import require
from data.jsonl import write_json
from data.text import markdown_table
from scripts.command_line import bare_words, quoted
from scripts.console import show_table, waiting


def expand(argv: list[str]) -> list[str]:
    """The runs, which need no option's name, as the value of --runs."""
    runs, rest = bare_words(argv)
    return [*rest, f"--runs=[{', '.join(map(quoted, runs))}]"] if runs else rest


def main(
    runs: list[str],
    common: bool = False,
    flipped: int = 10,
    csv: Path | None = None,
    markdown: Path | None = None,
    json: Path | None = None,
) -> None:
    """Compare evaluations of the same questions with the first of them; name two or more.

    Args:
        runs: Folders of evaluations; several with commas between, such as those of three seeds, are one run.
        common: Compare the questions that all have, instead of refusing runs of others.
        flipped: Questions shown of those that were wrong in the first run and are right in another, and the
            other way round.
        csv: File for a row a record of all runs.
        markdown: File for the table, in Markdown.
        json: File for all of it, with the ids of every flipped question.
    """
    from agent.evaluation.compare import compare, read_runs, table, write_csv

    require(flipped >= 0, "flipped", flipped, ">= 0")
    for name, file in {"csv": csv, "markdown": markdown, "json": json}.items():
        require(file is None or not file.is_dir(), name, str(file), "a file, not a folder")
    with waiting("reading the runs"):
        read = read_runs(runs)
        compared = compare(read, common)
    columns, rows = table(compared)
    clusters = f", {compared['clusters']:,} clusters" if compared["clusters"] < compared["n"] else ""
    show_table(f"{compared['n']:,} questions{clusters}", columns, rows)
    _show_flipped(read, compared, flipped)
    if csv:
        write_csv(csv, read)
    if markdown:
        atomic_write(markdown, markdown_table(columns, rows))
    if json:
        write_json(json, compared)


def _show_flipped(runs: dict, compared: dict, limit: int) -> None:
    first, *others = compared["runs"]
    answers = {name: {record["id"]: record for record in records} for name, records in runs.items()}
    rows = [
        (
            name,
            kind,
            id_,
            answers[first][id_]["question"],
            *(str(answers[n][id_]["answer"]) for n in (first, name)),
        )
        for name in others
        for kind in ("fixed", "broken")
        for id_ in compared["flipped"][name][kind][:limit]
    ]
    if rows:
        show_table("flipped", ("run", "", "id", "question", f"answer in {first}", "answer now"), rows)
