from __future__ import annotations

import math

import numpy as np
import pytest
from torch import Tensor

from ldm_vae.autoencoder.klt import fit_klt
from ldm_vae.autoencoder.rate import bits_per_pixel
from ldm_vae.metrics import limited_channels, water_filling, water_filling_at, water_level
from tests.evaluation.linear_autoencoder import random_fields


@pytest.fixture(scope="module")
def images() -> Tensor:
    return random_fields(count=6)


def test_water_filling_of_equal_variances_is_the_gaussian_rate_distortion_function() -> None:
    for nats in (0.5, 1.0, 2.0):
        point = water_filling([0.3] * 192, 8, 0.3 * math.exp(-2 * nats))
        assert point.squared_error == pytest.approx(0.3 * math.exp(-2 * nats))
        assert point.bits_per_pixel == pytest.approx(192 * nats / (64 * math.log(2)))
        same = limited_channels([0.3] * 192, 8, 192, nats)
        assert (same.squared_error, same.bits_per_pixel) == pytest.approx((point.squared_error, point.bits_per_pixel))


def test_water_filling_is_the_best_allocation() -> None:
    """Against scipy: minimise the error over non-negative rates with a fixed sum."""
    from scipy.optimize import minimize

    variances = np.array([4.0, 1.0, 0.25, 0.01])
    point = water_filling_at(variances, 1, 2.0)
    bits = 2.0 * 1  # one block of one pixel
    result = minimize(
        lambda r: (variances * 4.0**-r).mean(),
        np.full(4, bits / 4),
        bounds=[(0, None)] * 4,
        constraints={"type": "eq", "fun": lambda r: r.sum() - bits},
        options={"ftol": 1e-12},
    )
    assert point.bits_per_pixel == pytest.approx(2.0)
    assert point.squared_error == pytest.approx(result.fun, rel=1e-4)
    assert point.components == int((result.x > 1e-3).sum())


def test_the_water_level_takes_the_nats_that_were_asked_for() -> None:
    for nats in (0.0, 0.3, 2.0, 40.0):
        level = water_level([0.25, 4.0, 1.0, 0.0], nats)
        assert water_filling([0.25, 4.0, 1.0, 0.0], 1, level).bits_per_pixel == pytest.approx(nats / math.log(2))


def test_water_filling_at_no_rate_keeps_the_variance_and_falls_with_rate(images: Tensor) -> None:
    eigenvalues = fit_klt([images]).eigenvalues.tolist()
    points = [water_filling_at(eigenvalues, 8, rate) for rate in (0.0, 0.1, 0.3, 1.0)]
    assert points[0].squared_error == pytest.approx(sum(eigenvalues) / 192)
    assert [p.bits_per_pixel for p in points] == pytest.approx([0.0, 0.1, 0.3, 1.0], abs=1e-6)
    errors = [point.squared_error for point in points]
    assert errors == sorted(errors, reverse=True)
    assert points[1].components <= points[3].components
    with pytest.raises(ValueError, match="above 0"):
        water_filling(eigenvalues, 8, 0.0)


@pytest.mark.parametrize("nats", [0.05, 0.5, 2.5])
def test_a_limited_number_of_channels_has_the_best_allocation_of_its_rate(nats: float) -> None:
    """Against scipy: minimize the error over non-negative rates of the first channels with a fixed sum."""
    from scipy.optimize import minimize

    variances, channels = np.array([4.0, 1.0, 0.25, 0.03, 0.01, 0.004]), 4
    result = minimize(
        lambda r: (variances[:channels] * np.exp(-2 * r)).sum(),
        np.full(channels, nats),
        bounds=[(0, None)] * channels,
        constraints={"type": "eq", "fun": lambda r: r.sum() - channels * nats},
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    point = limited_channels(variances, 1, channels, nats)
    assert point.squared_error == pytest.approx((result.fun + variances[channels:].sum()) / 6, rel=1e-4)
    assert point.bits_per_pixel == pytest.approx(channels * nats / math.log(2))
    equal_rates = (variances[:channels].sum() * math.exp(-2 * nats) + variances[channels:].sum()) / 6
    assert point.squared_error < equal_rates


def test_all_channels_are_reverse_water_filling(images: Tensor) -> None:
    eigenvalues = fit_klt([images]).eigenvalues.tolist()
    for nats in (0.01, 0.3, 1.0):
        point = limited_channels(eigenvalues, 8, 192, nats)
        same = water_filling_at(eigenvalues, 8, point.bits_per_pixel)
        assert (point.psnr, point.components) == (pytest.approx(same.psnr), same.components)


def test_a_limited_number_of_channels_saturates_at_its_discarded_variance(images: Tensor) -> None:
    klt = fit_klt([images])
    eigenvalues = klt.eigenvalues.tolist()
    assert limited_channels(eigenvalues, 8, 4, 20.0).psnr == pytest.approx(klt.expected_psnr(4), abs=1e-6)
    point = limited_channels(eigenvalues, 8, 4, 1.0)
    assert point.bits_per_pixel == pytest.approx(bits_per_pixel(1.0, 4))
    assert point.psnr <= water_filling_at(eigenvalues, 8, point.bits_per_pixel).psnr
    with pytest.raises(ValueError, match="choose 1 to 192"):
        limited_channels(eigenvalues, 8, 193, 1.0)
