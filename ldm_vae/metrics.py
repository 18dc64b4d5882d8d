"""Measures of images: PSNR, SSIM, MS-SSIM, sharpness, their intervals; rate-distortion bounds; the use of a codebook.

Images are float (n, 3, h, w) in [-1, 1], so the data range is 2; a metric has one value per image. The 8-bit round trip
that every reported figure goes through belongs to the caller (`evaluation.reconstruction`); LPIPS lives with the loss
that uses it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ldm_vae.random import numpy_rng

__all__ = [
    "RatePoint",
    "bootstrap_interval",
    "codebook_usage",
    "limited_channels",
    "luma",
    "ms_ssim",
    "paired_difference",
    "psnr",
    "sharpness_ratio",
    "ssim",
    "ssim_luma",
    "water_filling",
    "water_filling_at",
    "water_level",
]

DATA_RANGE = 2.0
HIGHEST_PSNR_DB = 100.0
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
LUMA_WEIGHTS = (0.299, 0.587, 0.114)
"""ITU-R BT.601, as in JPEG."""

MS_SSIM_SMALLEST_SIDE = 161
"""Five scales of an 11-pixel window: the sides must exceed 10 * 2**4 pixels."""

METRIC_TITLES = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "ssim_luma": "SSIM luma",
    "ms_ssim": "MS-SSIM",
    "lpips": "LPIPS",
    "sharpness": "Sharpness ratio",
}


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (n,). Average these, not the errors. Equal images give 100 dB."""
    _check_pair(images, references)
    squared_error = (images.double() - references.double()).square().mean(dim=(1, 2, 3))
    floor = DATA_RANGE**2 * 10 ** (-HIGHEST_PSNR_DB / 10)
    return (10 * torch.log10(DATA_RANGE**2 / squared_error.clamp_min(floor))).float()


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity, (n,): Gaussian window of 11 pixels, sigma 1.5, mean over RGB (Wang 2004).

    As in the paper, and in scikit-image, only windows that lie inside the image count.
    """
    _check_pair(images, references)
    return _mean_similarity(images.float(), references.float())[0]


def luma(images: Tensor) -> Tensor:
    """RGB (n, 3, h, w) -> its brightness Y of ITU-R BT.601 in the same range, (n, 1, h, w)."""
    weights = torch.tensor(LUMA_WEIGHTS, device=images.device).view(1, 3, 1, 1)
    return (images.float() * weights).sum(dim=1, keepdim=True)


def ssim_luma(images: Tensor, references: Tensor) -> Tensor:
    """`ssim` of the luma, (n,): the variant of the original paper, which had gray images (Wang 2004)."""
    _check_pair(images, references)
    return _mean_similarity(luma(images), luma(references))[0]


def ms_ssim(images: Tensor, references: Tensor) -> Tensor:
    """Multi-scale SSIM over five octaves, (n,) (Wang 2003). Sides under 161 pixels are refused."""
    _check_pair(images, references)
    side = min(images.shape[-2:])
    if side < MS_SSIM_SMALLEST_SIDE:
        raise ValueError(f"ms_ssim: a side of {side} pixels is under {MS_SSIM_SMALLEST_SIDE}; use ssim")
    return multiscale_similarity(images.float(), references.float(), MS_SSIM_WEIGHTS)


def multiscale_similarity(
    images: Tensor, references: Tensor, weights: Sequence[float], window: int = 11, sigma: float = 1.5
) -> Tensor:
    """Product over scales of contrast with structure, at the last one of SSIM, each to its weight: (n,), >= 0.

    A scale where the images are opposed, which has no power, makes it 0. Differentiable, with finite gradients.
    """
    product = torch.ones(len(images), device=images.device)
    for scale, weight in enumerate(weights, start=1):
        whole, contrast = _mean_similarity(images, references, window, sigma)
        factor = whole if scale == len(weights) else contrast
        product = product * factor.clamp_min(1e-12) ** weight * (factor > 0)
        images, references = avg_pool2d(images, 2), avg_pool2d(references, 2)
    return product


def _mean_similarity(x: Tensor, y: Tensor, window: int = 11, sigma: float = 1.5) -> tuple[Tensor, Tensor]:
    """SSIM and its factor of contrast and structure, the mean over windows and channels, both (n,)."""
    contrast, luminance = similarity_maps(x, y, window, sigma)
    return (contrast * luminance).mean(dim=(1, 2, 3)), contrast.mean(dim=(1, 2, 3))


def similarity_maps(x: Tensor, y: Tensor, window: int = 11, sigma: float = 1.5) -> tuple[Tensor, Tensor]:
    """The factors of SSIM, contrast with structure and luminance (Wang 2004, equations 6 and 9).

    The luminance term takes brightness as [0, L], L the data range: it is not the same for shifted images.

    Args:
        x, y: (n, c, h, w) in [-1, 1].
        window: side of the Gaussian window in pixels, odd.
        sigma: its standard deviation in pixels.

    Returns:
        Both (n, c, h - window + 1, w - window + 1), a value for each window that lies inside the image.
    """
    vertical, horizontal = (_window_matrix(side, window, sigma).to(x) for side in x.shape[-2:])

    def local_mean(z: Tensor) -> Tensor:  # the window is separable, so two banded matrix products do
        return vertical @ z @ horizontal.T

    mean_x, mean_y = local_mean(x), local_mean(y)
    variance_x = local_mean(x * x) - mean_x.square()
    variance_y = local_mean(y * y) - mean_y.square()
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    contrast = (2 * covariance + c2) / (variance_x + variance_y + c2)
    bright_x, bright_y = mean_x + DATA_RANGE / 2, mean_y + DATA_RANGE / 2
    return contrast, (2 * bright_x * bright_y + c1) / (bright_x.square() + bright_y.square() + c1)


def _window_matrix(side: int, window: int, sigma: float) -> Tensor:
    """(side - window + 1, side): each row averages `window` neighbors with Gaussian weights."""
    offsets = torch.arange(window) - window // 2
    weights = torch.softmax(-offsets.square() / (2 * sigma**2), dim=0)
    matrix = torch.zeros(side - window + 1, side)
    for offset, weight in enumerate(weights):
        matrix.diagonal(offset).fill_(float(weight))
    return matrix


def sharpness_ratio(images: Tensor, references: Tensor) -> Tensor:
    """Sum of absolute pixel differences to the right and below, relative to the reference's, (n,).

    1 means as much fine contrast as the original, less is softer, more is noise or ringing.
    """
    _check_pair(images, references)

    def contrast(x: Tensor) -> Tensor:
        return x.diff(dim=-1).abs().sum(dim=(1, 2, 3)) + x.diff(dim=-2).abs().sum(dim=(1, 2, 3))

    return contrast(images.float()) / contrast(references.float()).clamp_min(1e-6)


def bootstrap_interval(
    values: np.ndarray, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over images; one value gives (value, value)."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"bootstrap_interval: values of shape {values.shape}; give a non-empty vector")
    picks = numpy_rng(seed, "bootstrap").integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(values: np.ndarray, baseline: np.ndarray) -> dict[str, float | None]:
    """Mean of values - baseline over the same images with its 95 % bootstrap interval, and Wilcoxon's p.

    `wilcoxon_p`: two-sided signed-rank test that the differences are symmetric about 0 (Wilcoxon 1945); None where it
    says nothing, which is under 6 images (no p under 0.05 exists) and where no difference is other than 0.
    """
    from scipy.stats import wilcoxon

    differences = np.subtract(np.asarray(values, np.float64), np.asarray(baseline, np.float64))
    low, high = bootstrap_interval(differences)
    tested = len(differences) >= 6 and bool(np.any(differences))
    p = float(wilcoxon(differences).pvalue) if tested else None
    return {"mean": float(differences.mean()), "low": low, "high": high, "wilcoxon_p": p}


def _check_pair(images: Tensor, references: Tensor) -> None:
    if images.ndim != 4 or images.shape != references.shape:
        raise ValueError(
            f"metrics: shapes {tuple(images.shape)} and {tuple(references.shape)}; give two of (n, 3, h, w)"
        )


def codebook_usage(indices: Tensor, size: int) -> dict[str, float]:
    """How a codebook of `size` codes is used by `indices` (any shape, at least one).

    Returns: `entropy_bits`, the entropy H of the empirical distribution of codes; `perplexity`, 2 ** H, the number of
        equally frequent codes with that entropy, from 1 to `size`; `dead_share`, of codes that never occur, in [0, 1].
        Fewer indices than codes leave codes unused: count over many more positions than there are codes.
    """
    if indices.numel() == 0:
        raise ValueError("codebook_usage: no indices; give those of at least one image")
    counts = torch.bincount(indices.reshape(-1).cpu(), minlength=size).double()
    if len(counts) > size:
        raise ValueError(f"codebook_usage: an index is {len(counts) - 1}, the codebook has {size} codes")
    share = counts[counts > 0] / counts.sum()
    entropy = max(0.0, -float((share * share.log()).sum()))
    return {
        "perplexity": math.exp(entropy),
        "dead_share": float((counts == 0).double().mean()),
        "entropy_bits": entropy / math.log(2),
    }


# What a linear code of blocks costs at best: rate and distortion from the eigenvalues of the block KLT alone.


@dataclass(frozen=True)
class RatePoint:
    """`bits_per_pixel` and the mean squared error of images in [-1, 1]; `components` carry rate."""

    bits_per_pixel: float
    squared_error: float
    components: int

    @property
    def psnr(self) -> float:
        """dB of the mean error (not the mean over images of their dB, which is higher)."""
        return 10 * math.log10(4.0 / self.squared_error) if self.squared_error > 0 else math.inf


def water_filling(eigenvalues: Sequence[float], block: int, water_level: float) -> RatePoint:
    """Reverse water-filling (Cover & Thomas, Elements of Information Theory, theorem 10.3.3).

    The rate-distortion function of independent blocks of Gaussian pixels with these `eigenvalues`:
    D = sum min(level, eigenvalue) / d and R = sum max(0, log2(eigenvalue / level) / 2) bits per block. Real pixels are
    not Gaussian and blocks not independent, so a nonlinear code can lie above it and a real linear one lies below.
    """
    if water_level <= 0:
        raise ValueError(f"water_filling: a water level of {water_level}; it is a variance above 0")
    values = np.asarray(eigenvalues, np.float64)
    wet = values[values > water_level]
    bits = 0.5 * np.log2(wet / water_level).sum()
    return RatePoint(float(bits) / block**2, float(np.minimum(values, water_level).mean()), len(wet))


def water_level(eigenvalues: Sequence[float], nats: float) -> float:
    """The level at which `water_filling` takes this number of nats for a block.

    With k wet components it is exp((sum of their ln(eigenvalue) - 2 nats) / k), largest at the right k.
    """
    logarithms = np.log(np.maximum(np.sort(np.asarray(eigenvalues, np.float64))[::-1], 1e-300))
    return float(np.exp(((logarithms.cumsum() - 2 * nats) / np.arange(1, len(logarithms) + 1)).max()))


def water_filling_at(eigenvalues: Sequence[float], block: int, bits_per_pixel: float) -> RatePoint:
    """The point of `water_filling` at a rate."""
    if bits_per_pixel < 0:
        raise ValueError(f"water_filling_at: {bits_per_pixel} bits per pixel; give 0 or more")
    return water_filling(eigenvalues, block, water_level(eigenvalues, bits_per_pixel * block**2 * math.log(2)))


def limited_channels(eigenvalues: Sequence[float], block: int, channels: int, nats: float) -> RatePoint:
    """The best linear code with the shape of a latent: the `channels` largest components, `nats` each on average.

    Reverse water-filling over these components alone, which gives each its own rate, and none to what lies under the
    water; the other components are lost: D = (sum over the first of min(level, eigenvalue) + sum of the others) / d.
    Gaussian, ideal code.

    Args:
        eigenvalues: falling, (d,).
    """
    values = np.asarray(eigenvalues, np.float64)
    if not 1 <= channels <= len(values):
        raise ValueError(f"limited_channels: {channels} channels; choose 1 to {len(values)}")
    first = values[:channels].tolist()
    kept = water_filling(first, block, water_level(first, channels * nats))
    error = kept.squared_error * channels + values[channels:].sum()
    return RatePoint(kept.bits_per_pixel, float(error) / len(values), kept.components)
