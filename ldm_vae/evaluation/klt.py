"""The linear baseline: principal components of pixel blocks, the best any linear code of the block can do.

An f8 autoencoder with c latent channels keeps c numbers per 8x8x3 block; so does this with c components.
Whatever a network gains over it on the same pixels is what training bought. Coefficients are not quantised.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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


def fit_klt(batches: Iterable[Tensor], block: int = 8) -> BlockKLT:
    """Fit on images (n, 3, h, w) in [-1, 1], read once; moments are summed in float64.

    Raises:
        ValueError: no image was given.
    """
    dimensions = 3 * block**2
    total = torch.zeros(dimensions, dtype=torch.float64)
    products = torch.zeros(dimensions, dimensions, dtype=torch.float64)
    count = 0
    for images in batches:
        vectors = _blocks(images, block).permute(0, 2, 3, 1).reshape(-1, dimensions).double().cpu()
        total += vectors.sum(dim=0)
        products += vectors.T @ vectors
        count += len(vectors)
    if count == 0:
        raise ValueError("fit_klt: no images; the baseline needs at least one training image")
    mean = total / count
    eigenvalues, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    return BlockKLT(block, mean, vectors.T.flip(0), eigenvalues.flip(0).clamp_min(0))


def _blocks(images: Tensor, block: int) -> Tensor:
    """(n, 3, h, w) -> (n, 3 * block**2, ceil(h / block), ceil(w / block)); replicated edges fill a block."""
    return pixel_unshuffle(pad_to_multiple(images, block), block)
