"""`sleuth report`: a run folder in, its report.html out."""

from __future__ import annotations

from pathlib import Path


def main(run: Path) -> None:
    """Write RUN/report.html: results, learning curves and a browser of trajectories in one file.

    Args:
        run: Run folder, finished or not.
    """
    from agent.report.page import write_report

    print(write_report(run))
