"""How the rest of the package uses any autoencoder: images in, moments out, latents in, images out.

Sizes that the downsampling f does not divide are padded by replication and cropped back, here and nowhere else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm_vae.autoencoder.deterministic import DETERMINISTIC_LOGVAR as DETERMINISTIC_LOGVAR
from ldm_vae.autoencoder.deterministic import DeterministicAdapter
from ldm_vae.autoencoder.frozen import AutoencoderFrozenEncoder
from ldm_vae.autoencoder.models import downsampling
from ldm_vae.autoencoder.quantized import AutoencoderQuantized
from ldm_vae.autoencoder.vector import AutoencoderVector
from ldm_vae.autoencoder.wavelet import AutoencoderWavelet
from ldm_vae.data.transforms import pad_to_multiple


def is_deterministic(autoencoder: Any) -> bool:
    """Whether its latents are points: `latent_dist.logvar` is `DETERMINISTIC_LOGVAR` everywhere and means no rate."""
    if isinstance(autoencoder, (AutoencoderWavelet, AutoencoderVector)):
        return bool(autoencoder.config.deterministic)
    return isinstance(autoencoder, (AutoencoderQuantized, AutoencoderFrozenEncoder, DeterministicAdapter))


@torch.no_grad()
def encode_moments(autoencoder: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (n, 3, h, w) in [-1, 1] -> posterior mean and log-variance, each (n, c, ⌈h/f⌉, ⌈w/f⌉), float32."""
    if isinstance(autoencoder, AutoencoderVector):
        autoencoder.check_images(images)  # before padding brings smaller ones to its size
    images = pad_to_multiple(images.to(autoencoder.dtype), downsampling(autoencoder))
    posterior = autoencoder.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist
    return posterior.mean.float(), posterior.logvar.float()


@torch.no_grad()
def decode(autoencoder: Any, latents: Tensor) -> Tensor:
    """Unnormalised latents (n, c, h, w) -> images (n, 3, fh, fw), float32, clamped to [-1, 1]."""
    return autoencoder.decode(latents.to(autoencoder.dtype)).sample.float().clamp(-1, 1)


def reconstruct(autoencoder: Any, images: Tensor, sample: torch.Generator | None = None) -> Tensor:
    """Encode and decode images of any size (n, 3, h, w); same shape, clamped to [-1, 1].

    From the posterior's mean, or from a posterior sample drawn with the generator `sample` (on the images' device).
    """
    mean, logvar = encode_moments(autoencoder, images)
    if sample is not None:
        noise = torch.randn(mean.shape, generator=sample, device=mean.device)
        mean = mean + torch.exp(0.5 * logvar) * noise
    return decode(autoencoder, mean)[..., : images.shape[-2], : images.shape[-1]]
