"""Known answers for what latents look like as data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ldm_vae.evaluation.health_metrics import (
    high_frequency_share,
    histogram_information,
    maximum_mean_discrepancy,
    power_spectrum,
    spectral_slope,
    spread_positions,
    tail_shares,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def colored_noise(alpha: float, side: int = 128, count: int = 8) -> Tensor:
    """Power falls as frequency^-alpha."""
    frequency = torch.fft.fftfreq(side)
    radius = (frequency[:, None] ** 2 + frequency**2).sqrt()
    radius[0, 0] = 1.0
    return torch.fft.ifft2(torch.fft.fft2(normal(count, 3, side, side)) * radius ** (-alpha / 2)).real


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0])
def test_the_slope_of_colored_noise(alpha: float) -> None:
    assert spectral_slope(*power_spectrum(colored_noise(alpha))) == pytest.approx(alpha, abs=0.12)


def test_a_slope_needs_three_bins() -> None:
    assert math.isnan(spectral_slope(*power_spectrum(normal(2, 3, 8, 8))))


def test_a_wave_has_its_power_at_its_frequency() -> None:
    wave = torch.cos(2 * torch.pi * 10 / 64 * torch.arange(64)).expand(1, 1, 64, 64)
    frequencies, power = power_spectrum(wave)
    assert float(frequencies[power.argmax()]) == pytest.approx(10 / 64)
    assert high_frequency_share(wave) < 0.01
    fast = torch.cos(2 * torch.pi * 24 / 64 * torch.arange(64)).expand(1, 1, 64, 64)
    assert high_frequency_share(fast) > 0.99


def test_white_noise_fills_the_plane_outside_the_circle() -> None:
    assert high_frequency_share(normal(8, 4, 64, 64)) == pytest.approx(1 - math.pi / 16, abs=0.01)


def test_tails_of_a_gaussian_and_of_one_spike() -> None:
    latents = normal(100, 2, 32, 32)
    latents[:, 1] = 0.0
    latents[5, 1, 3, 4] = 1.0
    gaussian, spike = tail_shares(latents)
    assert gaussian == pytest.approx(0.0127, abs=0.001)
    assert spike == pytest.approx(1.0, abs=1e-4)


def test_information_of_a_gaussian_channel() -> None:
    mean, noise = normal(200, 2, 16, 16), normal(200, 2, 16, 16, seed=1)
    mean[:, 1] = 0.0
    logvar = torch.full_like(mean, 2 * math.log(0.2))
    informative, silent = histogram_information(mean, logvar, noise)
    assert informative == pytest.approx(0.5 * math.log(1 + 1 / 0.04), abs=0.02)
    assert silent == pytest.approx(0.0, abs=0.02)


def test_discrepancy_of_equal_and_of_different_distributions() -> None:
    equal, p_equal = maximum_mean_discrepancy(normal(400, 4), normal(400, 4, seed=1))
    assert abs(equal) < 0.003
    assert p_equal > 0.05
    shifted, p_shifted = maximum_mean_discrepancy(normal(400, 4) + 0.5, normal(400, 4, seed=1))
    assert shifted > 0.02
    assert p_shifted == pytest.approx(1 / 201)


def test_the_discrepancy_equals_its_definition() -> None:
    x, y = normal(12, 3), normal(12, 3, seed=1) + 0.3
    distance = torch.cdist(torch.cat([x, y]), torch.cat([x, y])) ** 2
    median = distance[torch.triu(torch.ones(24, 24), 1) > 0].median()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return sum(torch.exp(-(torch.cdist(a, b) ** 2) / (2 * f**2 * median)) for f in (0.5, 1, 2)) / 3  # type: ignore

    within = [(kernel(a, a).sum() - 12) / (12 * 11) for a in (x, y)]
    expected = within[0] + within[1] - 2 * kernel(x, y).mean()
    assert maximum_mean_discrepancy(x, y)[0] == pytest.approx(float(expected), abs=1e-6)
    with pytest.raises(ValueError, match="give two sets of 4 or more, equal"):
        maximum_mean_discrepancy(x, y[:5])


def test_positions_come_equally_from_all_images() -> None:
    latents = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 3, 5, 5)
    rows = spread_positions(latents, 40)
    assert rows.shape == (40, 3)
    assert torch.unique(rows[:, 0], return_counts=True)[1].tolist() == [4] * 10
