"""The linear code of blocks as a part of a network: what a trained autoencoder starts from and adds to.

With many latent channels an 8x8 block is described by its own patterns, as transform coding does. A decoder of
nearest-neighbour upsampling and convolutions can hardly draw them: what it makes of constant latents is constant, so
every pattern with the period of the block is out of its reach. Beside it, one linear map of each latent position to its
8x8 pixels can. Both maps start at the Karhunen-Loeve transform of the training images (`klt`), the best linear code
there is, and the network learns what to add; the idea of a shortcut between space and channels is DC-AE's
(arXiv:2410.10733), where it is a mere rearrangement.

The maps' parameters are about 1 in size, whatever the images' spectrum: an optimizer's step then changes every
component alike. Fixed numbers (`spread`) bring them to the scale of pixels and latents.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ldm_vae.autoencoder.klt import BlockKLT

BLOCK = 8
PIXELS = 3 * BLOCK**2


class BlockAnalysis(nn.Module):
    """(n, 3, h, w) in [-1, 1] -> (n, c, h/8, w/8): each block's coefficients, of variance 1 where they were fitted."""

    spread: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.basis = nn.Conv2d(PIXELS, channels, 1)
        self.register_buffer("spread", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = 1 / (PIXELS**0.5 * self.spread)
        return self.basis(pixel_unshuffle(x, BLOCK)) * scale.to(x.dtype).view(1, -1, 1, 1)


class BlockSynthesis(nn.Module):
    """(n, c, h/8, w/8) -> (n, 3, h, w): the sum of each block's patterns, and the mean block."""

    spread: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.basis = nn.Conv2d(channels, PIXELS, 1)
        self.register_buffer("spread", torch.ones(channels))

    def forward(self, z: Tensor) -> Tensor:
        scale = self.spread / PIXELS**0.5
        return pixel_shuffle(self.basis(z * scale.to(z.dtype).view(1, -1, 1, 1)), BLOCK)


class Added(nn.Module):
    """(n, c or more, h, w), what the network found, and (n, c, h, w), coefficients: their sum, the rest as it is."""

    def forward(self, found: Tensor, coefficients: Tensor) -> Tensor:
        channels = coefficients.shape[1]
        return torch.cat([found[:, :channels] + coefficients, found[:, channels:]], dim=1)


@torch.no_grad()
def set_transform(analysis: BlockAnalysis, synthesis: BlockSynthesis, klt: BlockKLT) -> Tensor:
    """Both maps from the first components of a transform; the (c,) variances of the coefficients, float32."""
    channels = len(analysis.spread)
    components, variances = klt.components[:channels].float(), klt.eigenvalues[:channels].float().clamp_min(1e-6)
    rows = PIXELS**0.5 * components
    for module in (analysis, synthesis):
        module.spread.copy_(variances.sqrt())
    analysis.basis.weight.copy_(rows[:, :, None, None])
    analysis.basis.bias.copy_(-(rows @ klt.mean.float()))  # type: ignore[union-attr]
    synthesis.basis.weight.copy_(rows.T[:, :, None, None])
    synthesis.basis.bias.copy_(klt.mean.float())  # type: ignore[union-attr]
    return variances
