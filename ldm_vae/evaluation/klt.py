"""The linear baseline: principal components of pixel blocks, the best any linear code of the block can do.

An f8 autoencoder with c latent channels keeps c numbers per 8x8x3 block; so does this with c components.
Whatever a network gains over it on the same pixels is what training bought. Coefficients are not quantised; what they
would cost at best follows from the eigenvalues alone (`water_filling`, `limited_channels`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ldm_vae.autoencoder.interface import pad_to_multiple


@dataclass(frozen=True)
class BlockKLT:
    """The Karhunen-Loeve transform of block x block x 3 pixels, d = 3 * block**2 numbers each.

    `mean` (d,), `components` (d, d) with one component per row, `eigenvalues` (d,) falling: the
    variance along each component, in squared units of the [-1, 1] range.
    """

    block: int
    mean: Tensor
    components: Tensor
    eigenvalues: Tensor

    def reconstruct(self, images: Tensor, components: int) -> Tensor:
        """Images (n, 3, h, w), any size, from the first `components` coefficients of each block."""
        if not 1 <= components <= len(self.eigenvalues):
            raise ValueError(f"BlockKLT: {components} components; choose 1 to {len(self.eigenvalues)}")
        height, width = images.shape[-2:]
        basis = self.components[:components].to(images)
        mean = self.mean.to(images).view(1, -1, 1, 1)
        blocks = _blocks(images, self.block) - mean
        coefficients = torch.einsum("kd,ndhw->nkhw", basis, blocks)
        blocks = torch.einsum("kd,nkhw->ndhw", basis, coefficients) + mean
        return pixel_shuffle(blocks, self.block)[..., :height, :width]

    def expected_psnr(self, components: int) -> float:
        """dB of the mean squared error on the fitted images: the mean of the discarded eigenvalues."""
        error = self.eigenvalues[components:].sum() / len(self.eigenvalues)
        return float(10 * torch.log10(4.0 / error))


@dataclass(frozen=True)
class Moments:
    """Sums over blocks: `total` (d,), `products` (d, d), float64, and their `count`. Adding two merges their images."""

    total: Tensor
    products: Tensor
    count: int

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.total + other.total, self.products + other.products, self.count + other.count)


def block_moments(images: Tensor, block: int = 8) -> Moments:
    """Of the blocks of images (n, 3, h, w) in [-1, 1], any size."""
    vectors = _blocks(images, block).permute(0, 2, 3, 1).reshape(-1, 3 * block**2).double().cpu()
    return Moments(vectors.sum(dim=0), vectors.T @ vectors, len(vectors))


def solve_klt(moments: Iterable[Moments], block: int = 8) -> BlockKLT:
    """The transform of all images whose moments are given, added in their order.

    Raises:
        ValueError: no image was given.
    """
    parts = list(moments)
    if not parts:
        raise ValueError("fit_klt: no images; the baseline needs at least one training image")
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    mean = whole.total / whole.count
    eigenvalues, vectors = torch.linalg.eigh(whole.products / whole.count - torch.outer(mean, mean))
    return BlockKLT(block, mean, vectors.T.flip(0), eigenvalues.flip(0).clamp_min(0))


def fit_klt(batches: Iterable[Tensor], block: int = 8) -> BlockKLT:
    """Fit on images (n, 3, h, w) in [-1, 1], read once; moments are summed in float64.

    Raises:
        ValueError: no image was given.
    """
    return solve_klt((block_moments(images, block) for images in batches), block)


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


def water_filling_at(eigenvalues: Sequence[float], block: int, bits_per_pixel: float) -> RatePoint:
    """The point of `water_filling` at a rate, by bisection of the water level."""
    if bits_per_pixel < 0:
        raise ValueError(f"water_filling_at: {bits_per_pixel} bits per pixel; give 0 or more")
    high = math.log(max(float(max(eigenvalues)), 1e-300))
    low = high - 1.0
    while water_filling(eigenvalues, block, math.exp(low)).bits_per_pixel < bits_per_pixel and low > -600:
        low -= 10.0
    for _ in range(80):
        middle = 0.5 * (low + high)
        enough = water_filling(eigenvalues, block, math.exp(middle)).bits_per_pixel >= bits_per_pixel
        low, high = (middle, high) if enough else (low, middle)
    return water_filling(eigenvalues, block, math.exp(low))


def limited_channels(eigenvalues: Sequence[float], block: int, channels: int, nats: float) -> RatePoint:
    """The linear code with the shape of a latent: `channels` components at the same rate of `nats` each.

    D = (sum over them of eigenvalue exp(-2 nats) + sum of the discarded eigenvalues) / d. Gaussian, ideal code.
    """
    values = np.asarray(eigenvalues, np.float64)
    if not 1 <= channels <= len(values):
        raise ValueError(f"limited_channels: {channels} channels; choose 1 to {len(values)}")
    error = values[:channels].sum() * math.exp(-2 * nats) + values[channels:].sum()
    return RatePoint(channels * nats / (block**2 * math.log(2)), float(error) / len(values), channels)


def _blocks(images: Tensor, block: int) -> Tensor:
    """(n, 3, h, w) -> (n, 3 * block**2, ceil(h / block), ceil(w / block)); replicated edges fill a block."""
    return pixel_unshuffle(pad_to_multiple(images, block), block)
