from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm_vae import metrics


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.randn(2, 3, 24, 22, generator=rng), size=(200, 176), mode="bicubic")
    images = smooth.clamp(-1, 1)
    noise = torch.tensor([0.05, 0.4]).view(2, 1, 1, 1) * torch.randn(images.shape, generator=rng)
    return (images + noise).clamp(-1, 1), images


def test_psnr_of_a_constant_error_is_known() -> None:
    black = torch.full((2, 3, 8, 8), -1.0)
    shifted = black + torch.tensor([2 / 255, 0.2]).view(2, 1, 1, 1)
    assert metrics.psnr(shifted, black).tolist() == pytest.approx([20 * math.log10(255), 20.0], abs=1e-4)


def test_psnr_of_equal_images_is_finite() -> None:
    image = torch.zeros(1, 3, 8, 8)
    assert metrics.psnr(image, image).tolist() == [100.0]


def skimage_ssim(image: Tensor, reference: Tensor) -> float:
    """Of images (3, h, w) in [-1, 1] that are moved to [0, 1], with the settings of Wang 2004."""
    from skimage.metrics import structural_similarity

    x, y = ((image.double().numpy() + 1) / 2 for image in (image, reference))
    return float(
        structural_similarity(
            x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, channel_axis=0
        )
    )


def test_ssim_is_that_of_scikit_image(pair: tuple[Tensor, Tensor]) -> None:
    images, references = pair
    found = metrics.ssim(images, references)
    assert found.tolist() == pytest.approx([skimage_ssim(x, y) for x, y in zip(images, references)], abs=2e-6)
    assert found[0] > 0.9 > 0.7 > found[1]


@pytest.mark.parametrize(("level", "other", "expected"), [(125, 130, 0.9992), (0, 10, 0.061)])
def test_ssim_of_flat_grays_is_their_luminance_term(level: int, other: int, expected: float) -> None:
    """The luminance term has its zero at black: about the middle gray of [-1, 1] it would be below 0."""
    x, y = (torch.full((1, 3, 200, 200), value / 127.5 - 1) for value in (level, other))
    assert skimage_ssim(x[0], y[0]) == pytest.approx(expected, abs=5e-4)
    assert float(metrics.ssim(x, y)) == pytest.approx(skimage_ssim(x[0], y[0]), abs=1e-5)
    assert float(metrics.ssim_luma(x, y)) == pytest.approx(skimage_ssim(x[0], y[0]), abs=1e-5)
    assert float(metrics.ms_ssim(x, y)) == pytest.approx(skimage_ssim(x[0], y[0]) ** 0.1333, abs=1e-4)


def test_opposed_images_have_no_ms_ssim_and_a_finite_gradient(pair: tuple[Tensor, Tensor]) -> None:
    images = pair[1].clone().requires_grad_()
    value = metrics.ms_ssim(images, -images.detach()).sum()
    (gradient,) = torch.autograd.grad(value, images)
    assert value.item() == 0
    assert bool(gradient.isfinite().all())


def test_ms_ssim_is_the_product_of_torchmetrics_scales(pair: tuple[Tensor, Tensor]) -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure as measure

    images, references = pair
    expected = torch.ones(2)
    x, y = images + 1, references + 1  # its luminance term wants [0, data_range]
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        if scale == 4:
            _, full = measure(x, y, data_range=2.0, reduction="none", return_full_image=True)
            factor = full[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))
        else:
            _, factor = measure(x, y, data_range=2.0, reduction="none", return_contrast_sensitivity=True)
        expected = expected * factor**weight
        x, y = torch.nn.functional.avg_pool2d(x, 2), torch.nn.functional.avg_pool2d(y, 2)
    torch.testing.assert_close(metrics.ms_ssim(images, references), expected, atol=1e-5, rtol=0)


def test_ms_ssim_refuses_small_images() -> None:
    image = torch.zeros(1, 3, 160, 400)
    with pytest.raises(ValueError, match="160 pixels is under 161"):
        metrics.ms_ssim(image, image)


def test_sharpness_ratio_is_contrast_relative_to_the_reference(pair: tuple[Tensor, Tensor]) -> None:
    noisy, images = pair
    assert metrics.sharpness_ratio(images, images).tolist() == [1.0, 1.0]
    torch.testing.assert_close(metrics.sharpness_ratio(0.25 * images, images), torch.full((2,), 0.25))
    assert (metrics.sharpness_ratio(noisy, images) > 1).all()


def test_metrics_do_not_depend_on_the_batch(pair: tuple[Tensor, Tensor]) -> None:
    images, references = pair
    for metric in (metrics.psnr, metrics.ssim, metrics.ms_ssim, metrics.sharpness_ratio):
        alone = torch.cat([metric(x, y) for x, y in zip(images.split(1), references.split(1))])
        torch.testing.assert_close(metric(images, references), alone, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim, metrics.ms_ssim, metrics.sharpness_ratio])
def test_different_shapes_are_refused(metric: object) -> None:
    with pytest.raises(ValueError, match="give two of"):
        metric(torch.zeros(1, 3, 200, 200), torch.zeros(1, 3, 200, 208))  # type: ignore[operator]


def test_bootstrap_interval_matches_the_normal_one_for_many_values() -> None:
    values = np.random.default_rng(0).normal(20.0, 3.0, size=400)
    low, high = metrics.bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05)
    assert (low, high) == metrics.bootstrap_interval(values)


def test_bootstrap_interval_of_one_value_and_of_none() -> None:
    assert metrics.bootstrap_interval(np.array([3.0])) == (3.0, 3.0)
    with pytest.raises(ValueError, match="non-empty"):
        metrics.bootstrap_interval(np.array([]))


def test_luma_ssim_is_ssim_of_gray_and_weighs_green_most(pair: tuple[Tensor, Tensor]) -> None:
    images, references = pair
    gray, gray_reference = (metrics.luma(x).expand(-1, 3, -1, -1) for x in pair)
    torch.testing.assert_close(
        metrics.ssim_luma(images, references), metrics.ssim(gray, gray_reference), atol=1e-6, rtol=0
    )
    white = torch.ones(1, 3, 4, 4)
    torch.testing.assert_close(metrics.luma(white), torch.ones(1, 1, 4, 4))
    assert metrics.luma(torch.eye(3).view(3, 3, 1, 1)).flatten().tolist() == pytest.approx([0.299, 0.587, 0.114])


def test_paired_differences_see_what_unpaired_means_hide() -> None:
    rng = np.random.default_rng(0)
    content = rng.normal(25, 4, size=30)
    better, worse = content + 0.3 + 0.05 * rng.normal(size=30), content
    found = metrics.paired_difference(better, worse)
    assert found["mean"] == pytest.approx(0.3, abs=0.05)
    assert 0.2 < (found["low"] or 0) < (found["high"] or 0) < 0.4
    assert (found["wilcoxon_p"] or 1) < 1e-5
    assert metrics.bootstrap_interval(better)[0] < content.mean()  # unpaired: the intervals overlap


def test_paired_differences_of_nothing_are_not_tested() -> None:
    assert metrics.paired_difference(np.ones(10), np.ones(10))["wilcoxon_p"] is None
    assert metrics.paired_difference(np.arange(5.0), np.zeros(5))["wilcoxon_p"] is None


def test_usage_of_known_distributions() -> None:
    even = metrics.codebook_usage(torch.arange(8).repeat(5), 8)
    assert even == pytest.approx({"perplexity": 8.0, "dead_share": 0.0, "entropy_bits": 3.0})
    one = metrics.codebook_usage(torch.full((2, 3, 3), 5), 10)
    assert one == pytest.approx({"perplexity": 1.0, "dead_share": 0.9, "entropy_bits": 0.0})
    skewed = metrics.codebook_usage(torch.tensor([0, 0, 0, 1]), 4)
    bits = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert skewed == pytest.approx({"perplexity": 2**bits, "dead_share": 0.5, "entropy_bits": bits})
    with pytest.raises(ValueError, match="no indices"):
        metrics.codebook_usage(torch.zeros(0, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="the codebook has 4 codes"):
        metrics.codebook_usage(torch.tensor([4]), 4)
