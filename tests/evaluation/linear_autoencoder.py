"""A healthy autoencoder in closed form, for tests: an orthonormal block transform with the diffusers interface.

Its faults are injected by the tests. Images are smooth Gaussian random fields.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from ldm_vae import runtime
from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.klt import fit_klt

runtime.repair_torchvision()

from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

BLOCK = 8
CHANNELS = 4
RATE_NATS = 2.5


def random_fields(count: int = 48, side: int = 64, seed: int = 0) -> Tensor:
    """Smooth color images (n, 3, side, side): white noise through a low pass of about two blocks, mostly gray."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 3, side, side, generator=rng)
    frequency = torch.fft.fftfreq(side)
    radius = (frequency[:, None] ** 2 + frequency**2).sqrt()
    smooth = torch.fft.ifft2(torch.fft.fft2(noise) * torch.exp(-((radius * 14) ** 2))).real
    fields = smooth / smooth.std() * torch.tensor([0.28, 0.12, 0.09]).view(1, 3, 1, 1)
    gray_and_two_hues = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
    return torch.einsum("nkhw,kc->nchw", fields, gray_and_two_hues).clamp(-1, 1)


class LinearAutoencoder(Autoencoder):
    """The block KLT that gives flat blocks back exactly, its first coefficients, each scaled to variance 1."""

    config, dtype = SimpleNamespace(latent_channels=CHANNELS), torch.float32

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        blocks = pixel_unshuffle(images, BLOCK).transpose(0, 1).flatten(1)
        basis = fit_klt([images], BLOCK, flat=True).components[:CHANNELS].float()
        coefficients = basis @ blocks
        self.register_buffer("basis", basis)
        self.register_buffer("mean", coefficients.mean(dim=1))
        self.register_buffer("deviation", coefficients.std(dim=1))
        self.logvar = -2 * RATE_NATS

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.einsum("kd,ndhw->nkhw", self.basis, pixel_unshuffle(images, BLOCK))
        mean = (z - self.mean.view(1, -1, 1, 1)) / self.deviation.view(1, -1, 1, 1)
        return mean, torch.full_like(mean, self.logvar)

    def image(self, z: Tensor) -> Tensor:
        z = z * self.deviation.view(1, -1, 1, 1) + self.mean.view(1, -1, 1, 1)
        return pixel_shuffle(torch.einsum("kd,nkhw->ndhw", self.basis, z), BLOCK)

    def posterior(self, x: Tensor) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(torch.cat(self.moments(x), dim=1))
