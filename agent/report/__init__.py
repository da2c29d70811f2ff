"""A run folder -> report.html: one file, no network, results, curves and a browser of trajectories."""

from agent.report.page import write_report

__all__ = ["write_report"]
