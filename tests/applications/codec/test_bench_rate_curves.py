"""Bjøntegaard differences with known answers."""

from __future__ import annotations

import numpy as np
import pytest

from ldm_vae.applications.codec.bench import bd_rate, monotone, rate_at

RATES, QUALITIES = [0.1, 0.2, 0.4, 0.8], [25.0, 28.0, 31.0, 34.0]


def test_a_curve_of_half_the_bytes_is_minus_fifty_percent():
    half = [rate / 2 for rate in RATES]
    assert bd_rate(half, QUALITIES, RATES, QUALITIES) == pytest.approx(-50.0)
    assert bd_rate(RATES, QUALITIES, half, QUALITIES) == pytest.approx(100.0)
    assert bd_rate(RATES[::-1], QUALITIES[::-1], RATES, QUALITIES) == pytest.approx(0.0)


def test_only_the_shared_range_counts():
    # log rate over quality is a line of slope log(2)/3 in both; the second one reaches other qualities
    shifted = [quality + 4.5 for quality in QUALITIES]
    assert bd_rate(RATES, QUALITIES, RATES, shifted) == pytest.approx(100 * (2**1.5 - 1))
    assert bd_rate(RATES, QUALITIES, RATES, [quality + 100 for quality in QUALITIES]) is None
    assert bd_rate(RATES, QUALITIES, RATES, [quality + 8.95 for quality in QUALITIES]) is None
    assert bd_rate(RATES[:2], QUALITIES[:2], RATES, QUALITIES) is None


def test_points_that_bend_back_are_left_out():
    rates, qualities = monotone([0.1, 0.3, 0.2, 0.4], [20, 22, 23, 24])
    assert rates.tolist() == [0.1, 0.2, 0.4]
    assert qualities.tolist() == [20, 23, 24]
    assert bd_rate([0.1, 0.2], [30.0, 30.0], RATES, QUALITIES) is None


def test_the_rate_of_a_quality():
    assert rate_at(RATES, QUALITIES, 29.5) == pytest.approx(np.sqrt(0.08), rel=1e-6)
    assert rate_at(RATES, QUALITIES, 40.0) is None
