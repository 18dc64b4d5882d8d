"""What of a score is nothing but the size of the PNG."""

from __future__ import annotations

import numpy as np
import pytest

from ldm_vae.applications.anomaly.metrics import matched_auroc, partial_rank_correlation, png_bytes, rank_correlation


def test_noise_has_a_larger_png_than_a_plane():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert png_bytes(noise) > 10 * png_bytes(np.zeros_like(noise))


def test_a_score_that_is_only_complexity_falls_to_chance_when_matched():
    rng = np.random.default_rng(0)
    normal, anomalous = rng.uniform(100, 1000, 400), rng.uniform(400, 1000, 400)
    matched, share = matched_auroc(normal, anomalous, normal, anomalous)
    assert (normal[:, None] < anomalous).mean() > 0.6
    assert matched == pytest.approx(0.5, abs=0.03)
    assert share == 1.0


def test_a_score_of_its_own_survives_matching_and_strangers_have_no_match():
    size = np.full(20, 1000.0)
    assert matched_auroc(np.zeros(20), np.ones(20), size, size * 1.09) == (1.0, 1.0)
    assert matched_auroc(np.zeros(20), np.ones(20), size, size * 1.2) == (None, 0.0)
    sizes = np.concatenate([np.full(9, 1000.0), np.full(11, 5000.0)])
    assert matched_auroc(np.zeros(20), np.ones(20), size, sizes) == (None, 0.45)


def test_rank_correlations_of_a_case_worked_by_hand():
    x, y, z = np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 4]), np.array([2.0, 1, 4, 3])
    assert rank_correlation(x, y) == pytest.approx(0.8)
    assert rank_correlation(np.exp(x), y) == pytest.approx(0.8)
    assert rank_correlation(x, z) == pytest.approx(0.6)
    assert rank_correlation(y, z) == pytest.approx(0.0)
    assert partial_rank_correlation(x, y, z) == pytest.approx(0.8 / (1 - 0.36) ** 0.5)
    assert rank_correlation(x, np.ones(4)) is None
    assert partial_rank_correlation(x, y, x) is None


def test_what_follows_from_the_third_has_no_partial_correlation():
    rng = np.random.default_rng(0)
    size = rng.normal(size=3000)
    a, b = (size + 0.5 * rng.normal(size=3000) for _ in range(2))
    assert rank_correlation(a, b) > 0.7
    assert abs(partial_rank_correlation(a, b, size)) < 0.06
