"""The linear map finds what is linear, and a real picture's colours through a real latent."""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F

from ldm_vae.diffusion.pipeline import fit_latent_rgb, latents_to_rgb
from ldm_vae.random import generator


def test_a_linear_autoencoder_is_found_exactly() -> None:
    rng = generator(0, "previews")
    latents = torch.randn(8, 5, 6, 6, generator=rng)
    weights, bias = 0.1 * torch.randn(3, 5, generator=rng), torch.tensor([0.1, -0.2, 0.3])
    small = torch.einsum("nchw,dc->ndhw", latents, weights) + bias.view(1, 3, 1, 1)
    images = F.interpolate(small, scale_factor=8) + 0.2 * torch.tensor([1.0, -1.0]).repeat(24)  # stripes average out
    latent_rgb = fit_latent_rgb(latents, images)
    assert json.loads(json.dumps(latent_rgb)) == latent_rgb
    torch.testing.assert_close(torch.tensor(latent_rgb["weights"]), weights, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(latent_rgb["bias"]), bias, atol=1e-5, rtol=0)
    torch.testing.assert_close(latents_to_rgb(latents, latent_rgb), small.clamp(-1, 1), atol=1e-5, rtol=0)


def test_a_dead_channel_disturbs_nothing() -> None:
    latents = torch.randn(4, 2, 6, 6, generator=generator(0, "previews"))
    latents[:, 1] = 0
    images = F.interpolate(0.3 * latents[:, :1].expand(-1, 3, -1, -1), scale_factor=2)
    latent_rgb = fit_latent_rgb(latents, images)
    assert torch.tensor(latent_rgb["weights"])[:, 1].abs().max() < 1e-6
    assert latents_to_rgb(latents.bfloat16(), latent_rgb).dtype == torch.float32
