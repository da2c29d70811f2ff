"""Benchmarks: `python -m scripts.bench.NAME`; their figures are in docs/benchmarks.md."""
