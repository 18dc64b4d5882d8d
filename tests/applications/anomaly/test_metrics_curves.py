"""Ranked-list figures against cases worked by hand, with and without equal values."""

from __future__ import annotations

import numpy as np
import pytest

from ldm_vae.applications.anomaly import metrics

NORMAL, ANOMALOUS = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 3.5, 5.0])


def test_auroc_counts_pairs():
    """2 beats 1 and halves with 2; 3.5 beats three; 5 beats four: 8.5 of 12."""
    assert metrics.auroc(NORMAL, ANOMALOUS) == 8.5 / 12
    assert metrics.auroc(ANOMALOUS, NORMAL) == pytest.approx(1 - 8.5 / 12)
    assert metrics.auroc(np.ones(3), np.ones(4)) == 0.5
    assert metrics.auroc(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 1.0
    assert metrics.auroc(np.array([4.0, 2.0]), np.array([3.0, 1.0])) == 0.25


def test_rates_go_from_nothing_to_everything():
    false, true = metrics.rates(NORMAL, ANOMALOUS)
    assert false.tolist() == [0, 0.25, 0.25, 0.5, 0.75, 1]
    np.testing.assert_allclose(true, [1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1])


def test_average_precision_at_a_prevalence():
    """At half: steps of a third at (FPR, TPR) = (0, 1/3), (1/4, 2/3), (3/4, 1) with precisions 1, 8/11, 4/7."""
    assert metrics.average_precision(NORMAL, ANOMALOUS, 0.5) == pytest.approx((1 + 8 / 11 + 4 / 7) / 3)
    tenth = (1 + (2 / 3) / (2 / 3 + 9 / 4) + 1 / (1 + 9 * 3 / 4)) / 3
    assert metrics.average_precision(NORMAL, ANOMALOUS, 0.1) == pytest.approx(tenth)
    assert metrics.average_precision(np.ones(5), np.ones(5), 0.03) == pytest.approx(0.03)  # chance


def test_false_positive_rate_at_95_percent_found():
    assert metrics.false_positive_rate_at(NORMAL, ANOMALOUS) == 0.75
    assert metrics.false_positive_rate_at(NORMAL, ANOMALOUS, 0.6) == 0.25
    assert metrics.false_positive_rate_at(NORMAL, NORMAL + 10) == 0.0


def test_the_interval_covers_and_shrinks_with_more_images():
    rng = np.random.default_rng(0)
    few = metrics.auroc_interval(rng.normal(size=20), rng.normal(1.0, size=20))
    many = metrics.auroc_interval(rng.normal(size=800), rng.normal(1.0, size=800))
    true = 0.7602  # Phi(1 / sqrt 2)
    assert few[0] < true < few[1]
    assert many[0] < true < many[1]
    assert many[1] - many[0] < 0.3 * (few[1] - few[0])


def test_aupro_of_a_case_worked_by_hand():
    """Ten normal pixels, a region of two and one of one. In falling order: the one (overlap 1/2 at no error), a normal
    pixel (0.1), half of the two (3/4), a normal pixel (0.2), the other half (1), then the rest."""
    heat = np.array([[9.0, 0.0, 7.0, 5.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0], [8.0, 6.0, 0.0, 0.0, 0.0]])[:, :5]
    mask = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    normal = 15 - 3
    # overlap 1/2 up to 1/12, 3/4 up to 2/12, 1 from there on, up to 0.3
    expected = (0.5 / normal + 0.75 / normal + (0.3 - 2 / normal)) / 0.3
    assert metrics.pixel_aupro([heat], [mask]) == pytest.approx(expected)


def test_aupro_takes_equal_values_together_and_joins_touching_pixels():
    mask = np.eye(4, dtype=bool)  # diagonal neighbors are one region
    assert metrics.pixel_aupro([np.ones((4, 4))], [mask]) == pytest.approx(0.15)
    assert metrics.pixel_aupro([mask.astype(float)], [mask]) == pytest.approx(1.0)
    assert metrics.pixel_aupro([1.0 - mask], [mask]) == pytest.approx(0.0)
    pair = np.zeros((4, 4), bool)
    pair[0, 0] = pair[1, 1] = True
    apart = pair.copy()
    apart[3, 3] = True  # the second region is never seen: half, not a third
    assert metrics.pixel_aupro([pair.astype(float)], [apart]) == pytest.approx(0.5 + 0.5 * 0.15)
    two = np.zeros((4, 4), bool)
    two[0, 0] = two[3, 2:] = True
    heat = two * np.array([[1.0], [1.0], [1.0], [0.0]])  # the larger region is never seen: half, whatever its size
    assert metrics.pixel_aupro([heat, np.zeros((4, 4))], [two, np.zeros((4, 4), bool)]) == pytest.approx(
        0.5 + 0.5 * 0.15
    )


def test_aupro_needs_a_defect_and_a_normal_pixel():
    assert metrics.pixel_aupro([np.ones((2, 2))], [np.zeros((2, 2), bool)]) is None
    assert metrics.pixel_aupro([np.ones((2, 2))], [np.ones((2, 2), bool)]) is None
