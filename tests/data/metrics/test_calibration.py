"""Calibration against scikit-learn, tables computed by hand, and what BrowseComp-Plus published."""

import numpy as np
import pytest

from data.metrics.calibration import (
    auc,
    brier_score,
    expected_calibration_error,
    published_calibration_error,
    risk_coverage,
)


def stated(count, seed=0, levels=None):
    generator = np.random.default_rng(seed)
    confidence = generator.random(count) if levels is None else generator.integers(0, levels, count) / levels
    return confidence, (generator.random(count) < confidence**2).astype(float)


@pytest.mark.parametrize("levels", [None, 5])
def test_brier_and_auc_agree_with_scikit_learn(levels):
    from sklearn.metrics import brier_score_loss, roc_auc_score

    confidence, right = stated(500, levels=levels)
    assert brier_score(confidence, right) == pytest.approx(brier_score_loss(right, confidence))
    assert auc(confidence, right) == pytest.approx(roc_auc_score(right, confidence))
    assert auc(confidence, np.ones(500)) is None


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("count", [20, 203, 1000])
def test_ece_agrees_with_a_plain_loop_over_bins_of_equal_mass(count, norm):
    confidence, right = stated(count)
    order = np.argsort(confidence)
    # Question i of N lies in bin floor(10 i / N): sizes differ by one at most.
    bins = [[order[i] for i in range(count) if 10 * i // count == b] for b in range(10)]
    terms = [len(b) / count * abs(confidence[b].mean() - right[b].mean()) ** norm for b in bins]
    assert expected_calibration_error(confidence, right, norm=norm) == pytest.approx(sum(terms) ** (1 / norm))


def test_ece_of_a_table_by_hand_does_not_depend_on_the_order_of_equal_confidences():
    confidence, right = np.array([0.9, 0.9, 0.1, 0.1]), np.array([1.0, 0, 0, 0])
    assert expected_calibration_error(confidence, right, bins=2) == pytest.approx((0.4 + 0.1) / 2)
    confidence = np.full(100, 0.7)
    shuffled = np.random.default_rng(0).permutation((np.arange(100) < 40).astype(float))
    assert expected_calibration_error(confidence, shuffled) == pytest.approx(0.3)


def published(confidence, right, beta=100):
    """Return what the published function does, in its own steps: the bins without the last."""
    order = np.argsort(confidence)
    ends = [(i * beta, (i + 1) * beta) for i in range(len(order) // beta)]
    ends[-1] = (ends[-1][0], len(order))
    total = 0.0
    for start, end in ends[:-1]:
        part = order[start:end]
        total += (end - start) / len(order) * (confidence[part].mean() - right[part].mean()) ** 2
    return total**0.5


def test_the_published_function_reports_zero_for_fewer_than_200_answers_however_wrong_they_are():
    confidence, right = np.linspace(0.9, 1, 199), np.zeros(199)
    assert published_calibration_error(confidence, right) == 0 == published(confidence, right)
    assert expected_calibration_error(confidence, right, norm=2) == pytest.approx(0.95, abs=0.01)
    confidence, right = stated(830)
    assert published_calibration_error(confidence, right) == pytest.approx(published(confidence, right))
    # It leaves out the surest 130 of 830, which are all wrong here.
    right[np.argsort(confidence)[700:]] = 0
    assert expected_calibration_error(confidence, right, norm=2) > 1.3 * published(confidence, right)


def test_risk_and_coverage_of_a_table_by_hand():
    coverage, risk = risk_coverage(np.array([0.9, 0.2, 0.8, 0.1]), np.array([1.0, 1, 0, 0]))
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert risk.tolist() == pytest.approx([0, 1 / 2, 1 / 3, 2 / 4])
    assert risk_coverage(np.array([0.9, 0.1]), np.array([1.0, 0]))[1].mean() == pytest.approx((0 + 0.5) / 2)


def test_equal_confidences_have_the_mean_risk_of_all_their_orders():
    right = np.array([1.0, 0, 0, 1, 1])
    generator, total = np.random.default_rng(0), np.zeros(5)
    for _ in range(4000):
        drawn = generator.permutation(right)
        total += np.cumsum(1 - drawn) / np.arange(1, 6)
    assert risk_coverage(np.full(5, 0.5), right)[1] == pytest.approx(total / 4000, abs=0.02)
