"""Heat maps: their grid, their window, and that they are bright where images differ."""

from __future__ import annotations

import pytest
import torch

from ldm_vae.applications.anomaly import scores
from ldm_vae.autoencoder.losses import LPIPS
from ldm_vae.metrics import ssim


def test_a_pixel_spreads_over_its_window_and_keeps_its_sum():
    values = torch.zeros(1, 1, 64, 64)
    values[0, 0, 33, 22] = 16.0 * 9
    heat = scores.of_pixels(values)
    assert heat.shape == (1, 16, 16)
    expected = torch.zeros(16, 16)
    expected[7:10, 4:7] = 1.0
    torch.testing.assert_close(heat[0], expected)


def test_a_constant_stays_constant_to_the_border():
    for heat in (
        scores.of_pixels(torch.full((2, 1, 32, 32), 3.0)),
        scores.of_positions(torch.full((2, 1, 4, 4), 3.0), (8, 8)),
    ):
        torch.testing.assert_close(heat, torch.full((2, 8, 8), 3.0))


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Two images that differ in one corner."""
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    other = images.clone()
    other[..., 8:24, 40:56] = other[..., 8:24, 40:56].flip(-1)
    return images, other


def test_structure_differs_where_the_images_do(pair):
    heat = scores.structural_dissimilarity(*pair)[0, 0]
    assert heat.shape == (16, 16)
    assert float(heat[3:5, 11:13].min()) > 0.2
    assert float(heat[10:, :4].abs().max()) < 1e-4
    assert float(scores.structural_dissimilarity(pair[0], pair[0]).abs().max()) < 1e-6


def test_brightness_counts_at_the_coarsest_scale_only():
    images = 0.1 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    heat = scores.structural_dissimilarity(images, images + 0.5)
    luminance = 2 * 0.25 * 0.5 / (0.25**2 + 0.5**2)  # of brightness in [0, 1]; structure is equal
    assert float(heat.mean()) == pytest.approx((1 - luminance) / 2 / scores.SCALES, abs=5e-4)


def test_one_scale_of_it_is_ssim(pair):
    """Inside the image, where neither needs a border, it is the SSIM of `metrics`."""
    images, other = pair
    found = scores._similarity(images, other, with_luminance=True)[..., 5:-5, 5:-5].mean()
    torch.testing.assert_close(found, ssim(images, other)[0], atol=1e-4, rtol=0)


def test_perceptual_distance_is_lpips_by_place(pair, random_backbone):
    lpips = LPIPS("squeeze", str(random_backbone))
    heat = scores.perceptual_distance(lpips, *pair)
    assert heat.shape == (1, 1, 16, 16)
    assert float(heat.mean()) == pytest.approx(float(lpips(*pair)), rel=0.15)  # layers are resized, not averaged
    assert float(heat[0, 0, 2:6, 10:14].mean()) > 3 * float(heat[0, 0, 11:, :5].mean())
