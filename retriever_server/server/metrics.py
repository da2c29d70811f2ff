"""Metrics for Prometheus. Those of several workers add up where `share_metrics` was called before."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # the name that prometheus-client reads on import
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def share_metrics() -> tempfile.TemporaryDirectory[str]:
    """Return a folder in which child processes add up their numbers; call it before they start."""
    folder = tempfile.TemporaryDirectory(prefix="sleuth-metrics-")
    os.environ[_FOLDER] = folder.name
    return folder


def forget_process(pid: int) -> None:
    """Drop the gauges of a dead process."""
    for path in Path(os.environ[_FOLDER]).glob(f"gauge_live*_{pid}.db"):
        path.unlink(missing_ok=True)


class Metrics:
    """The numbers of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._serving: dict[str, str] = {}
        self.requests = Counter("sleuth_requests", "Requests.", ["route", "status"], registry=registry)
        self.request_seconds = Histogram(
            "sleuth_request_seconds", "Time to answer.", ["route"], registry=registry, buckets=_SECONDS
        )
        self.batch_queries = Histogram(
            "sleuth_batch_queries", "Different queries in one search.", registry=registry, buckets=_SIZES
        )
        self.search_seconds = Histogram(
            "sleuth_search_seconds", "Time of one search.", registry=registry, buckets=_SECONDS
        )
        self.failed_queries = Counter("sleuth_failed_queries", "Queries that failed.", registry=registry)
        self.waiting = self._gauge("sleuth_waiting_queries", "Queries in the queue.")
        self.generation = self._gauge("sleuth_generation", "Workers that serve it.", "backend", "generation")
        self.cache_hits = self._gauge("sleuth_cache_hits", "Of caches, since their start.", "backend")
        self.cache_misses = self._gauge("sleuth_cache_misses", "Of caches, since their start.", "backend")
        self.partial = self._gauge("sleuth_partial_searches", "Answered without a shard.", "backend")

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self._registry, multiprocess_mode="livesum")

    def note_request(self, route: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self.requests.labels(route, str(status)).inc()
        self.request_seconds.labels(route).observe(seconds)

    def note_batch(self, size: int, failed: int, seconds: float, waiting: int) -> None:
        """Count a searched batch; `waiting` queries wait for the next."""
        self.waiting.set(waiting)
        self.batch_queries.observe(size)
        self.search_seconds.observe(seconds)
        self.failed_queries.inc(failed)

    def note_backend(self, name: str, generation: str, description: Mapping[str, Any]) -> None:
        """Note what a backend says of itself."""
        before = self._serving.get(name, generation)
        self.generation.labels(name, before).set(0)
        self.generation.labels(name, generation).set(1)
        self._serving[name] = generation
        self.cache_hits.labels(name).set(_total(description, "hits"))
        self.cache_misses.labels(name).set(_total(description, "misses"))
        self.partial.labels(name).set(_total(description, "partial_searches"))

    def render(self) -> bytes:
        """Return the text format of Prometheus."""
        registry = self._registry
        if _FOLDER in os.environ:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)
        return generate_latest(registry)


def _total(description: Any, name: str) -> int:
    """Return the sum of all counts of this name in a retriever's description, however deep."""
    if isinstance(description, list):
        return sum(_total(part, name) for part in description)
    if not isinstance(description, Mapping):
        return 0
    own = description.get(name)
    return (own if isinstance(own, int) else 0) + sum(_total(part, name) for part in description.values())
