"""One forward pass of training: encode, sample, keep some channels, shrink, decode. All of it inside one module.

The data-parallel wrapper then sees every parameter that is used, whichever kind of autoencoder is inside.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_vae.autoencoder.interface import is_deterministic
from ldm_vae.autoencoder.quantized import AutoencoderQuantized


class Pass(NamedTuple):
    """What one forward pass gives.

    `reconstruction` (n, 3, h', w') of the images at its own size; `mean`, `logvar` (n, c, h/8, w/8), float32;
    `losses`: further scalar terms of a quantizer, `indices` (n, h/8, w/8) its codes (empty, None for other kinds).
    """

    reconstruction: Tensor
    mean: Tensor
    logvar: Tensor
    losses: dict[str, Tensor]
    indices: Tensor | None


class ReparameterizedAutoencoder(nn.Module):
    """An autoencoder as it is trained.

    Args:
        autoencoder: any with `encode(x).latent_dist` and `decode(z).sample`.
        encoder_frozen: nothing before the latent is trained, so no gradient is computed there.
    """

    def __init__(self, autoencoder: Any, encoder_frozen: bool = False) -> None:
        super().__init__()
        self.autoencoder: Any = autoencoder
        self.encoder_frozen = encoder_frozen
        self.deterministic = is_deterministic(autoencoder)

    def forward(
        self,
        images: Tensor,
        noise: Tensor,
        kept: Tensor | None = None,
        latent_side: int | None = None,
        disturbance: Tensor | None = None,
    ) -> Pass:
        """A training pass.

        Args:
            images: (n, 3, h, w) in [-1, 1].
            noise: standard normal, (n, c, h/8, w/8).
            kept: (n, c, 1, 1) of 0 and 1, the channels that the decoder gets; None: all.
            latent_side: the latents are shrunk to this side before they are decoded; None: as they are.
            disturbance: (n, c, h/8, w/8), added to the latents; None: nothing.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder_frozen):
            posterior = self.autoencoder.encode(images).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean if self.deterministic else mean + torch.exp(0.5 * logvar) * noise
        if disturbance is not None:
            latents = latents + disturbance
        losses: dict[str, Tensor] = {}
        indices = None
        if kept is not None:
            latents = latents * kept
        if latent_side is not None:
            latents = shrink(latents, latent_side)
        if isinstance(self.autoencoder, AutoencoderQuantized):
            quantized = self.autoencoder.quantize(latents)
            latents, losses, indices = quantized.latents, dict(quantized.losses), quantized.indices
            reconstruction = self.autoencoder.decode(latents, force_not_quantize=True).sample
        else:
            reconstruction = self.autoencoder.decode(latents).sample
        return Pass(reconstruction, mean, logvar, losses, indices)


def shrink(images: Tensor, side: int) -> Tensor:
    """(n, c, h, w) -> (n, c, side, side), antialiased, float32."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images.float(), (side, side), mode="bilinear", antialias=True, align_corners=False)


def channel_masks(counts: list[int], channels: int, chance: Tensor) -> Tensor:
    """(n, channels, 1, 1): half of the rows keep all channels, the others the first `counts[i]`, equally often.

    `chance`: (n,) uniform in [0, 1).
    """
    choices = torch.tensor([*counts, *[channels] * len(counts)], device=chance.device)
    keep = choices[(chance * len(choices)).long()]
    return (torch.arange(channels, device=chance.device) < keep[:, None]).float()[:, :, None, None]
