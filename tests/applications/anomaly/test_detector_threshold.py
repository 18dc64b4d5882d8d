"""Thresholds keep what they promise on average, for any distribution, and refuse to promise what they cannot."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ldm_vae.applications.anomaly.detector import (
    check_rate,
    images_for,
    p_values,
    percentiles,
    rate_interval,
    smallest_rate,
    threshold,
)
from ldm_vae.errors import UserError


@pytest.mark.parametrize(
    ("count", "rate", "rank"), [(19, 0.05, 19), (39, 0.05, 38), (99, 0.1, 90), (99, 0.01, 99), (20, 0.05, 20)]
)
def test_the_threshold_is_an_order_statistic(count, rate, rank):
    normal = np.random.default_rng(0).permutation(count) + 1.0
    assert threshold(normal, rate) == rank


def test_of_new_normal_images_no_more_than_the_rate_exceeds_it_on_average():
    rng = np.random.default_rng(0)
    found = [(rng.lognormal(size=400) > threshold(rng.lognormal(size=29), 0.1)).mean() for _ in range(1500)]
    assert 0.095 < np.mean(found) < 0.105
    low, high = rate_interval(29, 0.1)
    assert 0.93 < np.mean((np.array(found) > low) & (np.array(found) < high)) < 0.97


@pytest.mark.parametrize(("rate", "needed"), [(0.05, 19), (0.01, 99), (0.1, 9), (0.5, 1), (0.003, 333)])
def test_the_smallest_rate_that_images_support(rate, needed):
    assert images_for(rate) == needed
    check_rate(rate, needed)
    assert smallest_rate(needed) <= rate
    with pytest.raises(UserError, match=rf"needs {needed} held-out normal images, here are {needed - 1}"):
        check_rate(rate, needed - 1)


def test_the_rate_that_the_message_names_is_supported():
    with pytest.raises(UserError) as refused:
        check_rate(0.01, 42)
    named = float(str(refused.value).split("which support ")[1].split(" ")[0])
    check_rate(named, 42)
    assert math.isclose(named, 1 / 43, abs_tol=1e-4)


def test_percentiles_and_p_values_count_equal_scores_against_the_anomaly():
    normal = np.array([1.0, 2.0, 2.0, 3.0])
    values = np.array([0.0, 2.0, 2.5, 9.0])
    assert percentiles(normal, values).tolist() == [0.0, 25.0, 75.0, 100.0]
    assert p_values(normal, values).tolist() == [1.0, 0.8, 0.4, 0.2]
