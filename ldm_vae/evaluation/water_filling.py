"""What a linear code of blocks costs at best: rate and distortion from the eigenvalues of the block KLT alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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
    """The level at which `water_filling` takes so many nats for a block.

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
    """The linear code with the shape of a latent: `channels` components at the same rate of `nats` each.

    D = (sum over them of eigenvalue exp(-2 nats) + sum of the discarded eigenvalues) / d. Gaussian, ideal code.
    """
    values = np.asarray(eigenvalues, np.float64)
    if not 1 <= channels <= len(values):
        raise ValueError(f"limited_channels: {channels} channels; choose 1 to {len(values)}")
    error = values[:channels].sum() * math.exp(-2 * nats) + values[channels:].sum()
    return RatePoint(channels * nats / (block**2 * math.log(2)), float(error) / len(values), channels)
