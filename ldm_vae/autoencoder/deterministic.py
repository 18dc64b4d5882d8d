"""diffusers' deterministic autoencoders behind the interface of a posterior: `encode(x).latent_dist`, a point.

They keep diffusers' names, weights and settings: saved again, they are diffusers' own. Nothing here is trained. Saved
pipelines name this module, so these classes stay here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ldm_vae import runtime

runtime.repair_torchvision()

import diffusers
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from ldm_vae.autoencoder.base import Autoencoder, called_like_forward, deterministic_posterior, weights_at_hand


class DeterministicAdapter:
    """Mixin for a diffusers autoencoder whose `encode` returns latents: it returns `encode(x).latent_dist` instead."""

    deterministic = True
    forward = Autoencoder.forward

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """Images (n, 3, h, w) in [-1, 1] -> posterior over latents (n, c, h/f, w/f)."""
        posterior = deterministic_posterior(super().encode(x, return_dict=False)[0])  # type: ignore[misc]
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)


class AutoencoderTiny(DeterministicAdapter, diffusers.AutoencoderTiny, Autoencoder):
    """diffusers' `AutoencoderTiny` (TAESD, github.com/madebyollin/taesd)."""


class AutoencoderDC(DeterministicAdapter, diffusers.AutoencoderDC, Autoencoder):
    """diffusers' `AutoencoderDC` (DC-AE, arXiv:2410.10733)."""


class VQModel(DeterministicAdapter, diffusers.VQModel, Autoencoder):
    """diffusers' `VQModel` (arXiv:2112.10752): latents before quantization; `decode` quantizes."""

    kind = "vq"
    trainable = False  # its codebook loss has another shape

    @property
    def latent_channels(self) -> int:
        """Channels of the latent: the length of the codebook's vectors."""
        return int(self.config.vq_embed_dim or self.config.latent_channels)

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return int(self.config.num_vq_embeddings)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """Latents (n, c, h, w) -> images; quantizes first. diffusers reads the codebook's weight from outside."""
        with weights_at_hand(self.quantize.embedding):
            return super().decode(*args, **kwargs)

    @called_like_forward
    def quantized(self, latents: Tensor) -> Tensor:
        """The nearest codes."""
        with weights_at_hand(self.quantize.embedding):
            return self.quantize(latents)[0]


ADAPTED: dict[str, Any] = {adapter.__name__: adapter for adapter in (AutoencoderTiny, AutoencoderDC, VQModel)}
