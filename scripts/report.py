"""`sleuth report`: a run, an evaluation or a folder of several in, its report.html out."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from data.errors import require
from data.jsonl import read_text
from scripts.command_line import bare_words, quoted


def expand(argv: list[str]) -> list[str]:
    """Further runs, which need no option's name, as the value of --more."""
    runs, rest = bare_words(argv)
    more = [f"--more=[{', '.join(map(quoted, runs[1:]))}]"] if runs[1:] else []
    return [*runs[:1], *rest, *more]


def main(
    run: Path,
    more: list[Path] | None = None,
    out: Path | None = None,
    evaluations: str | None = None,
    verdict: Literal["all", "right", "wrong", "fixed", "broken"] = "all",
    kind: str | None = None,
    questions: str | None = None,
    megabytes: float = 5.5,
) -> None:
    """Write RUN/report.html: results, learning curves and a browser of trajectories in one file.

    Where the trajectories are too many for a page, it holds a sample in which every kind of question and
    every outcome has its share, and says so; the options choose others.

    Args:
        run: Run folder, finished or not; folder of an evaluation; or a folder of several of them. Several
            may be named: sleuth report RUN_A RUN_B.
        more: Further ones, side by side with it.
        out: File of the page, instead of RUN/report.html.
        evaluations: Only these: names or patterns such as after,dev-*. By default all, but of those on dev
            only the first, the best and the last.
        verdict: Only questions that are right or wrong in `after`, else in the last evaluation shown; or
            fixed or broken since the first.
        kind: Only questions of this kind.
        questions: Only these ids, with commas between; or a file of them, one a line.
        megabytes: About how large the page may get.
    """
    from agent.evaluation.report.choice import Choice
    from agent.evaluation.report.page import write_report

    require(not (out and out.is_dir()), "out", str(out), "a file, not a folder")
    ids: list[str] = []
    if questions:
        file = Path(questions)
        ids = read_text(file).splitlines() if file.is_file() else questions.split(",")
    wanted = tuple(id_.strip() for id_ in ids if id_.strip())
    choice = Choice(evaluations, verdict, kind, wanted, megabytes)
    if (run / "state.json").is_file() and choice == Choice() and not more:
        from rl.co_training.report import write_report as write_loop

        return print(write_loop(run, out))
    print(write_report(run, choice, more or (), out))
