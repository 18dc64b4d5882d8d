"""Latents without noise in the interface of a posterior, and diffusers' deterministic autoencoders behind it.

A deterministic encoder gives a point; here it becomes a Gaussian so narrow that a sample is its mean, which is what
lets shards, evaluation and diffusion treat every autoencoder alike. `AutoencoderTiny`, `AutoencoderDC` and `VQModel`
keep diffusers' names, weights and settings: saved again, they are diffusers' own. Nothing here is trained.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from torch import Tensor

from ldm_vae import runtime

runtime.repair_torchvision()

import diffusers
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput

DETERMINISTIC_LOGVAR = -30.0
"""Log-variance of a deterministic latent, the lower limit of diffusers' posterior: a standard deviation of 3e-7."""


def deterministic_posterior(latents: Tensor) -> DiagonalGaussianDistribution:
    """Latents (n, c, h, w) -> a posterior with this mean and the log-variance `DETERMINISTIC_LOGVAR` everywhere."""
    return DiagonalGaussianDistribution(torch.cat([latents, torch.full_like(latents, DETERMINISTIC_LOGVAR)], dim=1))


def posterior_output(posterior: DiagonalGaussianDistribution, return_dict: bool) -> AutoencoderKLOutput | tuple:
    """What `encode` returns, in diffusers' two forms."""
    return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)


class DeterministicAdapter:
    """Goes in front of a diffusers autoencoder whose `encode` returns bare latents: `encode(x).latent_dist` instead."""

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """Images (n, 3, h, w) in [-1, 1] -> posterior over latents (n, c, h/f, w/f)."""
        latents = super().encode(x, return_dict=False)[0]  # type: ignore[misc]
        return posterior_output(deterministic_posterior(latents), return_dict)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple:
        """Encode and decode (n, 3, h, w)."""
        this: Any = self
        return this.decode(this.encode(sample).latent_dist.mean, return_dict=return_dict)


class AutoencoderTiny(DeterministicAdapter, diffusers.AutoencoderTiny):
    """diffusers' `AutoencoderTiny` (TAESD, github.com/madebyollin/taesd)."""


class AutoencoderDC(DeterministicAdapter, diffusers.AutoencoderDC):
    """diffusers' `AutoencoderDC` (DC-AE, arXiv:2410.10733)."""


class VQModel(DeterministicAdapter, diffusers.VQModel):
    """diffusers' `VQModel` (arXiv:2112.10752): latents before quantization; `decode` quantizes."""


ADAPTED: dict[str, Any] = {adapter.__name__: adapter for adapter in (AutoencoderTiny, AutoencoderDC, VQModel)}
