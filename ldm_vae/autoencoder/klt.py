"""The linear baseline: principal components of pixel blocks, the best linear code of a block.

An f8 autoencoder with c latent channels keeps c numbers per 8x8x3 block; so does this with c components.
The difference of a network from it on the same pixels is the gain of training. Coefficients are not quantized; their
lowest possible cost follows from the eigenvalues alone (`evaluation.water_filling`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ldm_vae.data.transforms import pad_to_multiple


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

    def reconstruct(self, images: Tensor, components: int, gains: Tensor | None = None) -> Tensor:
        """Images (n, 3, h, w), any size, from the first `components` coefficients of each block.

        `gains` (components,): a factor for each coefficient; None: 1.
        """
        if not 1 <= components <= len(self.eigenvalues):
            raise ValueError(f"BlockKLT: {components} components; choose 1 to {len(self.eigenvalues)}")
        height, width = images.shape[-2:]
        basis = self.components[:components].to(images)
        mean = self.mean.to(images).view(1, -1, 1, 1)
        blocks = _blocks(images, self.block) - mean
        coefficients = torch.einsum("kd,ndhw->nkhw", basis, blocks)
        if gains is not None:
            coefficients = coefficients * gains.to(coefficients).view(1, -1, 1, 1)
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
    """The moments of the blocks of images (n, 3, h, w) in [-1, 1], any size."""
    vectors = _blocks(images, block).permute(0, 2, 3, 1).reshape(-1, 3 * block**2).double().cpu()
    return Moments(vectors.sum(dim=0), vectors.T @ vectors, len(vectors))


def solve_klt(moments: Iterable[Moments], block: int = 8, flat: bool = False) -> BlockKLT:
    """The transform of all images whose moments are given, added in their order.

    `flat`: the best transform that describes a block's mean color separately from its pattern. A flat block then stays
    flat, and keeps its color once the three mean-color components are included; the plain transform does not.

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
    covariance = whole.products / whole.count - torch.outer(mean, mean)
    if flat:
        colors = torch.eye(3, dtype=mean.dtype).repeat_interleave(block**2, 0) / block  # (d, 3), orthonormal
        means = colors @ colors.T
        patterns = torch.eye(len(mean), dtype=mean.dtype) - means
        covariance = means @ covariance @ means + patterns @ covariance @ patterns
        mean = means @ mean
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    return BlockKLT(block, mean, vectors.T.flip(0), eigenvalues.flip(0).clamp_min(0))


def fit_klt(batches: Iterable[Tensor], block: int = 8, flat: bool = False) -> BlockKLT:
    """Fit on images (n, 3, h, w) in [-1, 1], read once; moments are summed in float64. `flat`: as in `solve_klt`.

    Raises:
        ValueError: no image was given.
    """
    return solve_klt((block_moments(images, block) for images in batches), block, flat)


def _blocks(images: Tensor, block: int) -> Tensor:
    """(n, 3, h, w) -> (n, 3 * block**2, ceil(h / block), ceil(w / block)); replicated edges fill a block."""
    return pixel_unshuffle(pad_to_multiple(images, block), block)
