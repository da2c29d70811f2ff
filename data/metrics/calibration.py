"""Calibration of stated confidences, and what is gained by answering only the surest questions.

confidence (N,) in [0, 1], right (N,) of 0 and 1.
"""

from __future__ import annotations

import numpy as np

BINS = 10


def expected_calibration_error(
    confidence: np.ndarray, right: np.ndarray, bins: int = BINS, norm: int = 1
) -> float:
    """The gap of mean confidence and accuracy over bins of equal mass, weighted by their size.

    norm 2 is the root of the mean square (Hendrycks et al. 2019), as BrowseComp-Plus reports it. Equal
    confidences stay in one bin, so that the order of the questions decides nothing.
    [.9, .9, .1, .1], [1, 0, 0, 0], 2 bins -> mean of |.9 - .5| and |.1 - 0| = .25
    """
    level_of = np.unique(confidence, return_inverse=True)[1]
    ends = np.cumsum(np.bincount(level_of))  # questions up to each level
    bin_of_level = (ends - 1) * bins // len(confidence)
    place = bin_of_level[level_of]
    counts = np.bincount(place, minlength=bins)
    gaps = np.bincount(place, confidence - right, minlength=bins) / np.maximum(counts, 1)
    return float((counts / len(confidence) @ np.abs(gaps) ** norm) ** (1 / norm))


def published_calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """The calibration error as BrowseComp-Plus' evaluate_run.py computes it (@97c637c), faults included.

    Bins of 100 in the order of confidence, the last one with the rest; that last bin is then left out, so
    that fewer than 200 answers give 0 whatever they are. Fewer than 100 are reported as 0, too.
    """
    order = np.argsort(confidence)
    total = 0.0
    for start in range(0, (len(order) // 100 - 1) * 100, 100):
        part = order[start : start + 100]
        total += 100 / len(order) * (confidence[part].mean() - right[part].mean()) ** 2
    return float(np.sqrt(total))


def brier_score(confidence: np.ndarray, right: np.ndarray) -> float:
    """Mean square of confidence less outcome (Brier 1950)."""
    return float(np.mean((confidence - right) ** 2))


def auc(confidence: np.ndarray, right: np.ndarray) -> float | None:
    """Chance that a right answer has more confidence than a wrong one, ties half; None without both."""
    from scipy.stats import rankdata

    positives = int(right.sum())
    negatives = len(right) - positives
    if not positives or not negatives:
        return None
    ranks = rankdata(confidence)[right > 0].sum()
    return float((ranks - positives * (positives + 1) / 2) / (positives * negatives))


def risk_coverage(confidence: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and risk (share wrong among those answered) as answers are given by falling confidence.

    Among equal confidences it is the mean over all orders. Returns two arrays (N,): coverage i/N, risk.
    The mean risk is the AURC (Geifman & El-Yaniv 2017); lower is better.
    """
    level_of = np.unique(-confidence, return_inverse=True)[1]
    size = np.bincount(level_of)
    expected = np.bincount(level_of, 1 - right) / size  # wrong per question of a level
    wrong = np.cumsum(np.repeat(expected, size))
    answered = np.arange(1, len(confidence) + 1)
    return answered / len(confidence), wrong / answered
