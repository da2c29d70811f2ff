"""A run folder -> report.html: one file, no network, results, curves and a browser of trajectories."""
