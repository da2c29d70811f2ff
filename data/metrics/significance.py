"""Significance of differences: intervals by resampling clusters, p-values by flipping signs; seeded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data.text import counted

FEW_CLUSTERS = 20
"""Below this many clusters resampling alone gives intervals that are too narrow."""
RESAMPLES = 10_000
SEED = 0
_DRAWN_AT_ONCE = 2_000_000
"""Bounds the memory of a block of resamples."""


def bootstrap(values: np.ndarray, clusters: Sequence[str]) -> np.ndarray:
    """95 % percentile intervals of the means of `values` under resampling of whole clusters.

    values (N, M), clusters (N,) -> (2, M): lower and upper ends. A mean is that of all questions
    of the clusters drawn, so a large cluster weighs as much as it has questions. With few clusters the
    percentiles lie further out (`_tail`).
    """
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    size = len(names)  # C clusters
    columns = np.column_stack([values, np.ones(len(values))])
    sums = np.zeros((size, columns.shape[1]))  # (C, M + 1), the last column counts questions
    np.add.at(sums, index, columns)
    generator = np.random.default_rng(SEED)
    rows = max(1, _DRAWN_AT_ONCE // size)
    means = []
    for start in range(0, RESAMPLES, rows):
        count = min(rows, RESAMPLES - start)
        drawn = generator.integers(0, size, (count, size)) + size * np.arange(count)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size)
        totals = weights @ sums
        means.append(totals[:, :-1] / totals[:, -1:])
    tail = _tail(size)
    return np.percentile(np.concatenate(means), [100 * tail, 100 * (1 - tail)], axis=0)


def estimate(values: np.ndarray, clusters: Sequence[str]) -> list[dict[str, Any]]:
    """Mean, low and high of each column, and the number of clusters where these are few.

    values (N, M), clusters (N,). One cluster alone says nothing of spread: low and high None.
    """
    means = values.mean(axis=0).tolist()
    count = len(set(clusters))
    few = {"few_clusters": count} if count < FEW_CLUSTERS else {}
    if count < 2:
        return [{"mean": mean, "low": None, "high": None} for mean in means]
    low, high = bootstrap(values, clusters).tolist()
    rows = zip(means, low, high, strict=True)
    return [dict(zip(("mean", "low", "high"), row, strict=True)) | few for row in rows]


def _tail(clusters: int) -> float:
    """The share of resampled means beyond each end of a 95 % interval.

    .025; with few clusters less, so that the interval is as wide as Student's: the "expanded percentile
    interval" (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 5.3).
    """
    if not 1 < clusters < FEW_CLUSTERS:
        return 0.025
    from scipy.stats import norm, t

    return float(norm.cdf(-np.sqrt(clusters / (clusters - 1)) * t.ppf(0.975, clusters - 1)))


def randomisation_p(differences: np.ndarray) -> np.ndarray:
    """Two-sided p-values of mean differences under Fisher's paired randomisation (Smucker et al. 2007).

    differences (N, M) of N pairs -> (M,): how often the mean is as far from 0 when each pair's sign is
    tossed, the same toss for all M.   [[1], [1], [1]] -> about .25
    """
    observed, generator = np.abs(differences.mean(axis=0)), np.random.default_rng(SEED)
    rows = max(1, _DRAWN_AT_ONCE // len(differences))
    as_far = np.zeros(differences.shape[1])
    for start in range(0, RESAMPLES, rows):
        signs = generator.integers(0, 2, (min(rows, RESAMPLES - start), len(differences))) * 2.0 - 1
        as_far += (np.abs(signs @ differences / len(differences)) >= observed - 1e-12).sum(axis=0)
    return (1 + as_far) / (1 + RESAMPLES)


def format_estimate(estimate: Mapping[str, Any], signed: bool = False) -> str:
    """An estimate for people.   {"mean": .617, "low": .53, "high": .687} -> "0.617 [0.530, 0.687]"

    One that rests on few clusters names their number. signed: as a difference, "+0.617 [+0.530, +0.687]".
    """
    sign = "+" if signed else ""
    mean, low, high = (estimate[key] for key in ("mean", "low", "high"))
    if low is None:
        return f"{mean:{sign}.3f}"
    few = f" ({counted(estimate['few_clusters'], 'cluster')})" if "few_clusters" in estimate else ""
    return f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]{few}"
